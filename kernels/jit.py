"""Triton kernels as plain functions: interpreted on a CPU, compiled on a GPU, or compiled ahead of time.

A kernel is a function at module level under `@kernel`. It is written against `tl`, which its file imports under
`TYPE_CHECKING` alone: the function never runs where it stands, so that a file of kernels imports without Triton. What
runs is a copy of it in a namespace in which `tl` is there and the other kernels that it calls are copies of the same
form. Hence one process can hold both forms, whatever TRITON_INTERPRET said when Triton was imported.

A launch is a `Call`, plain data: the kernel, its arguments by name, its constants, warps and stages. Who runs it can be
replaced (`launcher`): the Triton artifact looks a compiled binary up instead of compiling one.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surgeon.errors import UnsupportedError

Ptr = Any
"""A tensor's address, as a kernel sees it."""
Int = Any
Float = Any
Tile = Any
"""A block of values in registers."""
_ALIASES = ("Ptr", "Int", "Float", "Tile")
Constant = int | float | bool
Value = torch.Tensor | int | float
Launcher = Callable[["Call"], None]

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8",
    torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
"""Triton's names of the dtypes."""


class Kernel:
    """A Triton function and its grid.

    Attributes:
        function: as written.
        rule: programs along each axis, see `programs`; empty for a helper that only kernels call.
    """

    def __init__(self, function: types.FunctionType, rule: tuple[str, ...]) -> None:
        self.function, self.rule = function, rule
        functools.update_wrapper(self, function)
        self.name = function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Kernels call kernels only inside Triton."""
        raise TypeError(f"{self.name} is a Triton kernel: it is launched, not called")

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names of the parameters that are passed at a launch, in order."""
        return tuple(name for name in self.parameters if name not in self.constants)

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters, in order."""
        code = self.function.__code__
        return code.co_varnames[: code.co_argcount]

    @functools.cached_property
    def constants(self) -> frozenset[str]:
        """Names of the parameters that are compiled in."""
        annotated = self.function.__annotations__
        return frozenset(name for name in self.parameters if annotated.get(name) == "tl.constexpr")

    @functools.cached_property
    def compiled(self) -> Any:
        """The form that a GPU runs, and that compiles ahead of time: triton's JITFunction."""
        triton = _triton()
        return triton.runtime.jit.JITFunction(self._copy("compiled", triton.language.constexpr))

    @functools.cached_property
    def interpreted(self) -> Any:
        """The form that runs on CPU tensors: triton's InterpretedFunction."""
        from surgeon.kernels.interpreter import interpreted

        return interpreted(self._copy("interpreted", lambda number: number))

    def _copy(self, form: str, constant: Callable[[Constant], Any]) -> types.FunctionType:
        """The function with `tl` and with the kernels and numbers it names, in a namespace of its own."""
        namespace = dict(self.function.__globals__, tl=_triton().language)
        namespace |= dict.fromkeys(_ALIASES, constant(0))  # the compiler looks annotations up
        for name in self.function.__code__.co_names:
            value = namespace.get(name)
            if isinstance(value, Kernel):
                namespace[name] = getattr(value, form)
            elif isinstance(value, int | float):
                namespace[name] = constant(value)
        copy = types.FunctionType(self.function.__code__, namespace, self.name, self.function.__defaults__)
        functools.update_wrapper(copy, self.function)
        del vars(copy)["__wrapped__"]
        return copy

    def launch(self, *, warps: int = 4, stages: int = 2, **values: Value) -> None:
        """Run the kernel on tensors of one device: compiled on a GPU, interpreted on a CPU."""
        call = Call.of(self, values, warps, stages)
        if all(call.grid):
            (_launchers[-1] if _launchers else run)(call)


@dataclass(frozen=True)
class Call:
    """One launch.

    Attributes:
        kernel: what runs.
        arguments: in the order of the kernel.
        constants: what it is compiled for.
        warps: per program, of 32 threads; see `options` for AMD.
        stages: how deep its loops are pipelined.
    """

    kernel: Kernel
    arguments: Mapping[str, Value]
    constants: Mapping[str, Constant]
    warps: int
    stages: int

    @classmethod
    def of(cls, kernel: Kernel, values: Mapping[str, Value], warps: int, stages: int) -> Call:
        """A call from arguments and constants by name.

        Raises:
            TypeError: a parameter has no value, or a value no parameter.
        """
        if set(values) != set(kernel.parameters):
            odd = sorted(set(values) ^ set(kernel.parameters))
            raise TypeError(f"{kernel.name}: arguments and parameters differ in {', '.join(odd)}")
        constants = {name: value for name in kernel.parameters if name in kernel.constants for value in [values[name]]}
        return cls(kernel, {name: values[name] for name in kernel.arguments}, constants, warps, stages)  # type: ignore[arg-type]

    @property
    def grid(self) -> tuple[int, ...]:
        """Programs along each axis."""
        return programs(self.kernel.rule, {**self.arguments, **self.constants})

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The arguments that are tensors."""
        return [value for value in self.arguments.values() if isinstance(value, torch.Tensor)]

    @property
    def types(self) -> dict[str, str]:
        """Triton type of every argument: `*fp16`, `i32`, `i64`, `fp32`."""
        return {name: _type(value) for name, value in self.arguments.items()}


def kernel(*rule: str) -> Callable[[Callable[..., Any]], Kernel]:
    """Declares a kernel with its grid, `@kernel("N/BN", "B*H")`, or a helper of kernels, `@kernel()`."""
    return lambda function: Kernel(function, rule)  # type: ignore[arg-type]


def programs(rule: tuple[str, ...], values: Mapping[str, Any]) -> tuple[int, ...]:
    """The grid: along each axis a product, `*`, of names and of quotients that are rounded up, `M/BM`."""
    return tuple(math.prod(_quotient(factor, values) for factor in axis.split("*")) for axis in rule)


def _quotient(factor: str, values: Mapping[str, Any]) -> int:
    name, _, divisor = factor.partition("/")
    return -(-int(values[name]) // (int(values[divisor]) if divisor else 1))


def _type(value: Value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def run(call: Call) -> None:
    """Compiled where the tensors are on a GPU, interpreted where they are on a CPU."""
    device = call.tensors[0].device
    if device.type == "cpu":
        interpret(call)
        return
    with torch.cuda.device(device):
        width = torch.cuda.get_device_properties(device).warp_size
        chosen = options(call.warps, call.stages, width, amd=torch.version.hip is not None)
        call.kernel.compiled[call.grid](**call.arguments, **call.constants, **chosen)


def options(warps: int, stages: int, width: int, *, amd: bool) -> dict[str, int]:
    """Triton's options: as many threads in warps of this width, and one stage fewer on AMD.

    There a load that is under way waits in registers, not in shared memory, and the stage is what spills.
    """
    return {"num_warps": max(1, warps * 32 // width), "num_stages": max(1, stages - amd)}


def interpret(call: Call) -> None:
    """Run program after program on CPU tensors; see `surgeon.kernels.interpreter` for what it does not show."""
    from surgeon.kernels.interpreter import interpreting

    with interpreting():
        call.kernel.interpreted.run(grid=call.grid, warmup=False, **call.arguments, **call.constants)


_launchers: list[Launcher] = []


@contextlib.contextmanager
def launcher(replacement: Launcher) -> Iterator[None]:
    """Within it, launches go to `replacement`."""
    _launchers.append(replacement)
    try:
        yield
    finally:
        _launchers.pop()


@functools.cache
def missing() -> str:
    """Why no kernel can be built here, "" if they can, or if launches go elsewhere."""
    if _launchers:
        return ""
    try:
        _triton()
    except UnsupportedError as error:
        return error.what
    return ""


@functools.cache
def _triton() -> Any:
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise UnsupportedError("Triton is not installed", "", "pip install 'model-surgeon[triton]' (Linux)") from error
    return triton
