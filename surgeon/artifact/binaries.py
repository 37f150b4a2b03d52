"""Which binary of an artifact runs on which GPU, and its launch.

A GPU runs the binaries of its own architecture; else those of a lower minor version of the same major one; else the
PTX of sm_80, which the driver compiles on load; else none. sm_90 PTX and later are tied to their architecture.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.artifact.driver import Driver, scalar
from surgeon.artifact.manifest import verified
from surgeon.errors import UnsupportedError
from surgeon.kernels.jit import Call

FALLBACK = "sm_80"
_NOT_COMPILED_IN = "UPCAST"  # is False in every binary; in the interpreter alone it is not


def choose(archs: Iterable[str], capability: tuple[int, int], where: str) -> tuple[str, bool]:
    """The architecture whose binaries a GPU of this compute capability runs, and whether it takes their PTX.

    Raises:
        UnsupportedError: it runs none of them.
    """
    known = {arch: _version(arch) for arch in archs}
    major, minor = capability
    fits = [arch for arch, version in known.items() if version[0] == major and version[1] <= minor]
    if fits:
        return max(fits, key=known.__getitem__), False
    if FALLBACK in known and capability >= known[FALLBACK]:
        return FALLBACK, True
    has = ", ".join(sorted(known))
    what = f"the artifact has no binaries for sm_{major}{minor}; it has {has}"
    raise UnsupportedError(what, where, f"export it with --arch {has},sm_{major}{minor}".replace(" ", ""))


def _version(arch: str) -> tuple[int, int]:
    number = arch.removeprefix("sm_")
    return int(number[:-1]), int(number[-1])


class Binaries:
    """The binaries of one architecture; stands in for Triton's launcher (`surgeon.kernels.jit.launcher`).

    Args:
        folder: the artifact.
        records: the manifest's entries.
        arch: the architecture.
        text: load the PTX in place of the binaries.
        driver: launches.
        stream: the handle of the current stream.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[Mapping[str, Any]],
        arch: str,
        text: bool,
        driver: Driver,
        stream: Callable[[], int],
    ) -> None:
        self.folder, self.arch, self.text, self.driver, self.stream = folder, arch, text, driver, stream
        self._records = {_key(one): one for one in records if one["target"] == arch}
        self._functions: dict[str, ctypes.c_void_p] = {}

    def __call__(self, call: Call) -> None:
        """Launch a kernel's binary.

        Raises:
            UnsupportedError: there is none for these constants and types, or an argument breaks what it was promised.
        """
        record = self._find(call)
        given = dict(call.arguments)
        values = [scalar(kind, given[name]) for name, kind in record["arguments"].items()]
        values += [ctypes.c_void_p(None)] * record["trailing"]
        function = self._function(record)
        shared = int(record["shared"])
        self.driver.launch(function, call.grid, int(record["threads"]), shared, self.stream(), values, record["file"])

    def _find(self, call: Call) -> Mapping[str, Any]:
        name = call.kernel.name
        key = _key({"kernel": name, "constants": call.constants, "arguments": call.types})
        if key not in self._records:
            constants = ", ".join(f"{k}={v}" for k, v in call.constants.items())
            what = f"the artifact has no binary of {name} for {constants}"
            raise UnsupportedError(what, str(self.folder), "export it again with this version of surgeon")
        record = self._records[key]
        odd = [arg for arg in record["divisible"] if int(call.arguments[arg]) % 16]
        odd += [arg for arg, value in call.arguments.items() if hasattr(value, "data_ptr") and value.data_ptr() % 16]
        if odd:
            what = f"{name} was compiled for a multiple of 16 in {', '.join(odd)}"
            raise UnsupportedError(what, str(self.folder), "export it again with this version of surgeon")
        return record

    def _function(self, record: Mapping[str, Any]) -> ctypes.c_void_p:
        file = str(record["ptx" if self.text else "file"])
        if file not in self._functions:
            code = verified(self.folder / file, record["ptx_sha256" if self.text else "sha256"])
            module = self.driver.load(code, file)
            self._functions[file] = self.driver.function(module, record["symbol"], int(record["shared"]))
        return self._functions[file]


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    constants = {name: value for name, value in record["constants"].items() if name != _NOT_COMPILED_IN}
    return record["kernel"], tuple(sorted(constants.items())), tuple(record["arguments"].items())
