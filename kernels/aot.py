"""Kernels compiled ahead of time: a binary for an architecture, on a machine that has no such GPU, or none.

    binary = build(variant, target("sm_90"))

A `Variant` says what a kernel is compiled for: the types of its arguments, its constants, warps and stages, and which
arguments are promised to be multiples of 16. Every file of kernels declares its own as `VARIANTS`. A `Binary` is all
that a launch needs beside the arguments, see `Binary.record`.

`build` refuses a binary that spills registers, that multiplies tiles with fewer than 16 values in the inner dimension,
that needs more shared memory than the target has, or that wants scratch memory: the first loses more time than a kernel
wins, the second compiles on some targets only, the third does not start, and no launcher provides the fourth.
"""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.errors import CheckFailed, UsageError
from surgeon.kernels.jit import Call, Constant, Kernel, _triton, options

MINIMUM_INNER = 16
"""Inner dimension of the smallest tile product that every target compiles."""


@dataclass(frozen=True)
class Target:
    """An architecture: `name` as `--arch` takes it, and Triton's three words for it."""

    name: str
    backend: str
    arch: int | str
    warp: int

    @property
    def binary(self) -> str:
        """Suffix of its binaries."""
        return "cubin" if self.backend == "cuda" else "hsaco"

    @property
    def text(self) -> str:
        """Suffix of its assembler text; PTX of sm_80 runs on every later NVIDIA GPU, through the driver's compiler."""
        return "ptx" if self.backend == "cuda" else "amdgcn"

    def options(self, variant: Variant) -> dict[str, int]:
        """Triton's options, `num_warps` among them, for a variant."""
        return options(variant.warps, variant.stages, self.warp, amd=self.backend == "hip")


TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
"""What the kernels are tested for."""
SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx90a": 64, "gfx942": 64}
"""Shared memory of a program at most, KiB."""


def target(name: str) -> Target:
    """The target of a name such as sm_90 or gfx942.

    Raises:
        UsageError: it is no such name.
    """
    if re.fullmatch(r"sm_\d+", name):
        return Target(name, "cuda", int(name[3:]), 32)
    if re.fullmatch(r"gfx[0-9a-f]+", name):
        return Target(name, "hip", name, 64 if name.startswith("gfx9") else 32)
    raise UsageError(f"there is no architecture '{name}'", "--arch", f"one of {', '.join(TARGETS)}")


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for.

    Attributes:
        kernel: the kernel.
        label: tells the variants of a kernel apart, for example "f16-m16".
        signature: types of its arguments in order, as words: "*fp16 *u8 i32 fp32".
        constants: values of its constants.
        warps: per program, of 32 threads.
        stages: how deep its loops are pipelined.
        divisible: arguments promised to be multiples of 16; addresses of tensors always are.
    """

    kernel: Kernel
    label: str
    signature: str
    constants: Mapping[str, Constant]
    warps: int = 4
    stages: int = 2
    divisible: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.kernel.name}-{self.label}"

    @property
    def types(self) -> dict[str, str]:
        """Type of every argument."""
        return dict(zip(self.kernel.arguments, self.signature.split(), strict=True))

    def serves(self, call: Call) -> bool:
        """Whether a binary of this variant does what a call asks for."""
        if call.kernel is not self.kernel or call.constants != self.constants or call.types != self.types:
            return False
        aligned = all(tensor.data_ptr() % 16 == 0 for tensor in call.tensors)
        return aligned and all(int(call.arguments[name]) % 16 == 0 for name in self.divisible)


@dataclass(frozen=True)
class Binary:
    """A compiled variant.

    Attributes:
        variant: what it was compiled for.
        target: where it runs.
        code: cubin or hsaco.
        text: PTX or AMD assembler.
        symbol: name of the function in it.
        shared: bytes of dynamic shared memory; above 48 KB a launcher has to allow it.
        registers: per thread.
        spilled: bytes per thread in local memory.
        trailing: null pointers to pass after the arguments (Triton's scratch memory, of which none is used).
    """

    variant: Variant
    target: Target
    code: bytes = field(repr=False)
    text: str = field(repr=False)
    symbol: str
    shared: int
    registers: int
    spilled: int
    trailing: int

    @property
    def threads(self) -> int:
        """Per program."""
        return self.warps * self.target.warp

    @property
    def warps(self) -> int:
        """Of the target, per program."""
        return self.target.options(self.variant)["num_warps"]

    def record(self) -> dict[str, Any]:
        """What a manifest says of it, in JSON's types; its files are written beside."""
        kernel = self.variant.kernel
        return {
            "kernel": kernel.name, "label": self.variant.label, "target": self.target.name, "symbol": self.symbol,
            "sha256": hashlib.sha256(self.code).hexdigest(), "threads": self.threads, "shared": self.shared,
            "arguments": self.variant.types, "constants": dict(self.variant.constants),
            "divisible": sorted(self.variant.divisible), "grid": list(kernel.rule), "trailing": self.trailing,
            "warps": self.warps, "registers": self.registers, "spilled": self.spilled,
        }  # fmt: skip


def build(variant: Variant, where: Target, *, check: bool = True) -> Binary:
    """Compile a variant; no GPU and no driver is needed.

    Raises:
        CheckFailed: see the head of this file; not with `check` off.
        UnsupportedError: Triton is not installed.
    """
    triton = _triton()
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget(where.backend, where.arch, where.warp)
    made = triton.compile(_source(variant), target=gpu, options=where.options(variant))
    code, text = made.asm[where.binary], made.asm[where.text]
    registers, spilled = (_nvidia if where.backend == "cuda" else _amd)(code, text)
    trailing = _parameters(text, where) - len(variant.kernel.arguments)
    binary = Binary(variant, where, code, text, made.metadata.name, made.metadata.shared, registers, spilled, trailing)
    if check:
        _check(binary, made.asm["ttir"], int(getattr(made.metadata, "global_scratch_size", 0) or 0))
    return binary


def _source(variant: Variant) -> Any:
    """Triton's own description; the keys are positions, and every argument is listed, as at a launch on a GPU."""
    triton, kernel = _triton(), variant.kernel
    types = {name: variant.types.get(name, "constexpr") for name in kernel.parameters}
    places = {name: (kernel.parameters.index(name),) for name in kernel.parameters}
    whole = {name for name, kind in variant.types.items() if kind.startswith("*")} | variant.divisible
    attributes = {places[name]: [["tt.divisibility", 16]] if name in whole else [] for name in kernel.arguments}
    constants = {places[name]: variant.constants[name] for name in kernel.parameters if name in kernel.constants}
    return triton.compiler.ASTSource(kernel.compiled, types, constexprs=constants, attrs=attributes)


def _check(binary: Binary, ttir: str, scratch: int) -> None:
    where = f"{binary.variant.name} for {binary.target.name}"
    if binary.spilled:
        what = f"{binary.spilled} bytes per thread are spilled ({binary.registers} registers)"
        raise CheckFailed(what, where, "smaller tiles or more warps")
    inner = min(inner_dimensions(ttir), default=MINIMUM_INNER)
    if inner < MINIMUM_INNER:
        raise CheckFailed(f"tl.dot over {inner} values", where, f"at least {MINIMUM_INNER}: pad the tile with zeros")
    if binary.shared > 1024 * SHARED.get(binary.target.name, 1 << 20):
        raise CheckFailed(f"{binary.shared} bytes of shared memory are needed", where, "smaller tiles or fewer stages")
    if scratch or binary.trailing < 0:
        raise CheckFailed(f"{scratch} bytes of scratch memory are asked for", where, "no tensor descriptors on device")


def inner_dimensions(ttir: str) -> list[int]:
    """K of every product of tiles `[.., M, K] × [.., K, N]` in Triton's intermediate text."""
    found = re.findall(r"tt\.dot(?:_scaled)? .*? : tensor<((?:\d+x)+)\w+> \* tensor<", ttir)
    return [int(shape.split("x")[-2]) for shape in found]


def _parameters(text: str, where: Target) -> int:
    """Parameters of the function, Triton's own among them."""
    if where.backend == "cuda":
        return len(re.findall(r"^\s*\.param ", text.partition(".entry")[2].partition(")")[0], re.MULTILINE))
    return len(re.findall(r"\.value_kind:\s+(?!hidden)", text))


def _amd(code: bytes, text: str) -> tuple[int, int]:
    """Vector registers, and bytes of private memory per thread."""
    found = {name: int(count) for name, count in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    return found["vgpr_count"], found["private_segment_fixed_size"] + 4 * found["vgpr_spill_count"]


def _nvidia(code: bytes, text: str) -> tuple[int, int]:
    """Registers, and bytes of stack per thread, where spilled ones go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(\w+):(\d+)", listing.partition("Function")[2]))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


@functools.cache
def _cuobjdump() -> str:
    return str(Path(_triton().__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
