"""What is measured of a kernel: how to run it, its exact result, libraries that do the same, and the work it is."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

Run = Callable[[], torch.Tensor | Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        kernel: name of its file.
        shape: in words.
        run: the kernel.
        exact: the same in float64.
        tolerance: largest |run − exact| / max |exact| of any result.
        libraries: who else computes it, by name; a library that is not installed is left out.
        flops: operations of tensor cores.
        moved: bytes that have to be read and written.
    """

    kernel: str
    shape: str
    run: Run
    exact: Run
    tolerance: float
    libraries: dict[str, Run] = field(default_factory=dict)
    flops: float = 0.0
    moved: float = 0.0


def cases(device: torch.device, *, small: bool) -> list[Case]:
    """Those of every file in this folder with a function `cases(device, small)`; small ones run in the interpreter."""
    found: list[Case] = []
    for info in pkgutil.iter_modules(importlib.import_module("benchmarks.gpu").__path__):
        if info.name not in ("__main__", "case"):
            module = importlib.import_module(f"benchmarks.gpu.{info.name}")
            found += module.cases(device, small=small) if hasattr(module, "cases") else []
    return found


def results(run: Run) -> list[torch.Tensor]:
    """What a run returns, as a list."""
    result = run()
    return [result] if isinstance(result, torch.Tensor) else list(result)


def error(run: Run, exact: Sequence[torch.Tensor]) -> float:
    """max |run − exact| / max |exact|, the largest of the results; NaN counts as infinite."""
    return max(_relative(got, wanted) for got, wanted in zip(results(run), exact, strict=True))


def bytes_of(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors together."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def installed(name: str) -> bool:
    """Whether a library can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    scale = float(exact.double().abs().max()) or 1.0
    found = float((got.double() - exact.double()).abs().max()) / scale
    return found if found == found else float("inf")
