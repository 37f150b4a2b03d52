"""NVIDIA's driver through ctypes: modules, functions, launches. No compiler and no runtime library besides it.

A kernel's parameters go to `cuLaunchKernel` as an array of addresses, each of a value of the parameter's own type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from surgeon.errors import SurgeonError, UnsupportedError

Scalar = Any
"""A ctypes value."""
LIBRARY = "libcuda.so.1"
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
STATIC_SHARED = 48 * 1024
"""Bytes of shared memory that a launch may ask for without being allowed more first."""
_KINDS = {"i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
          "i64": ctypes.c_int64, "u8": ctypes.c_uint8, "fp32": ctypes.c_float, "fp64": ctypes.c_double}  # fmt: skip


class Driver:
    """The calls of the driver that a launch takes.

    Args:
        path: of the library.

    Raises:
        UnsupportedError: it is not there.
    """

    def __init__(self, path: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise UnsupportedError(f"no NVIDIA driver: {error}", path, "--device cpu runs the artifact here") from error

    def load(self, code: bytes, name: str) -> ctypes.c_void_p:
        """The module of a cubin, or of PTX, which the driver compiles."""
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", name, ctypes.byref(module), ctypes.create_string_buffer(code, len(code) + 1))
        return module

    def function(self, module: ctypes.c_void_p, symbol: str, shared: int) -> ctypes.c_void_p:
        """A function of a module, allowed its bytes of dynamic shared memory."""
        found = ctypes.c_void_p()
        self._call("cuModuleGetFunction", symbol, ctypes.byref(found), module, symbol.encode())
        if shared > STATIC_SHARED:
            self._call("cuFuncSetAttribute", symbol, found, ctypes.c_int(MAX_DYNAMIC_SHARED), ctypes.c_int(shared))
        return found

    def launch(
        self,
        function: ctypes.c_void_p,
        grid: Sequence[int],
        threads: int,
        shared: int,
        stream: int,
        values: Sequence[Scalar],
        name: str,
    ) -> None:
        """Launch a function on a stream of the current context.

        Args:
            function: from `function`.
            grid: programs along up to three axes.
            threads: of a program.
            shared: bytes of dynamic shared memory.
            stream: its handle.
            values: a ctypes value for every parameter.
            name: for errors.
        """
        axes = [ctypes.c_uint(n) for n in (*grid, 1, 1)[:3]]
        block = [ctypes.c_uint(n) for n in (threads, 1, 1)]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        rest = (ctypes.c_uint(shared), ctypes.c_void_p(stream), addresses, ctypes.c_void_p(None))
        self._call("cuLaunchKernel", name, function, *axes, *block, *rest)

    def _call(self, entry: str, name: str, *arguments: Any) -> None:
        code = getattr(self._library, entry)(*arguments)
        if code:
            raise SurgeonError(f"{entry} failed with CUDA error {code}{self._words(code)}", name, "surgeon doctor")

    def _words(self, code: int) -> str:
        text = ctypes.c_char_p()
        found = self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text)) == 0 and text.value
        return f": {text.value.decode()}" if found and text.value else ""


def scalar(kind: str, value: Any) -> Scalar:
    """A parameter of one of Triton's types as a ctypes value; of a tensor its address."""
    if kind.startswith("*"):
        return ctypes.c_void_p(value.data_ptr())
    return _KINDS[kind](value)
