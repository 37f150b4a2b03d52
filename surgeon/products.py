"""Products with a frozen weight, by the fastest kernel torch has for them on this device.

On CPUs in fp32, oneDNN computes them 5–12 % faster than MKL, which `torch.nn.functional.linear` calls (1024 rows, AMD
EPYC with AVX-512; benchmarks/train_step.md). Values equal up to rounding. Nothing here is differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 64
"""Below so many rows the weight is read but once, and oneDNN's reordering of it costs more than it gains."""


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias: `[n, in]`, `[out, in]`, `[out]` → `[n, out]`."""
    if _by_onednn(x, weight):
        return _linear(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x W: `[n, out]`, `[out, in]` → `[n, in]`."""
    return _linear(x, weight.t(), None, "none", [], "") if _by_onednn(x, weight) else x @ weight


def add_times(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total + x W, written into `total` where that is as fast: `[n, in]`, `[n, out]`, `[out, in]` → `[n, in]`."""
    if _by_onednn(x, weight):
        return _linear.binary(x, total, weight.t(), None, "add")
    return total.addmm_(x, weight)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return plain and x.shape[0] >= ROWS and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


_linear: Any = torch.ops.mkldnn._linear_pointwise
