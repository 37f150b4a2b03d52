"""Which kernel runs in place of plain torch where tensors are on a GPU.

A graph holds `surgeon.attention`, `surgeon.nf4_linear` and `surgeon.int_linear` on every device. When such a node runs
on a GPU it asks here: the answer is the kernel's result, or None, and then plain torch goes on as it does on a CPU. A
kernel says itself what it does not take (`can_use`); traced and fake tensors never reach one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgeon.numerics import FourBit
from surgeon.numerics_int import Groups


def is_gpu(x: Tensor) -> bool:
    """Whether kernels may run on x: it has values, and they are on a GPU."""
    return x.is_cuda and not torch.compiler.is_compiling() and not isinstance(x, torch._subclasses.FakeTensor)


def segmented_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, plain: bool, **pattern: Any
) -> Tensor | None:
    """Shifted sparse attention (`surgeon.kernels.shifted_attention`).

    Args:
        q: see `surgeon.ops.attention`, as k, v and the mask.
        k: see q.
        v: see q.
        mask: see q.
        plain: whether there is no bias, sink, soft cap, dropout or prefix, which the kernel does not know.
        pattern: scale, group, causal, wrap and window.
    """
    if not plain or not is_gpu(q):
        return None
    from surgeon.kernels.shifted_attention import Pattern, can_use
    from surgeon.kernels.shifted_attention_backward import shifted_attention_op

    q, k, v = (x.to(_compute_dtype(x)) for x in (q, k, v))
    asked = Pattern(**pattern)
    if can_use(q, k, v, asked):
        return None
    options = (asked.scale, asked.group, asked.causal, asked.wrap, asked.window)
    result: Tensor = shifted_attention_op(q, k, v, mask, *options)[0]
    return result


def weight(stored: FourBit | Groups, dtype: torch.dtype) -> Tensor | None:
    """The decoded weight (`surgeon.kernels.nf4`, `surgeon.kernels.int_groups`)."""
    if not is_gpu(stored.codes):
        return None
    from surgeon.kernels import int_groups, nf4

    if isinstance(stored, Groups):
        return None if int_groups.can_use(stored, dtype) else int_groups.int_dequantise(*_parts(stored), dtype)
    return None if nf4.can_use(stored, dtype) else nf4.nf4_dequantise(*_parts(stored), dtype)


def linear(
    x: Tensor, bias: Tensor | None, stored: FourBit | Groups, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor | None:
    """x Wᵀ + low upᵀ + bias for few rows that need no gradient (`nf4_matmul`, `int_matmul` of `surgeon.kernels`).

    Training decodes the weight, once in each pass: it has many rows, and the product is a library's.
    """
    if not is_gpu(x) or _needs_gradient(x, bias, low, up):
        return None
    from surgeon.kernels import int_matmul, nf4_matmul

    rows, kernel = x.reshape(-1, x.shape[-1]), int_matmul if isinstance(stored, Groups) else nf4_matmul
    if kernel.can_use(rows, stored, bias, low, up):
        return None
    operator = int_matmul.int_matmul if isinstance(stored, Groups) else nf4_matmul.nf4_matmul
    result: Tensor = operator(rows, bias, low, up, *_parts(stored)).view(*x.shape[:-1], stored.shape[0])
    return result


def scores(hidden: Tensor, bias: Tensor | None) -> bool:
    """Whether `losses` takes the logits of these hidden states, which have their dtype."""
    if not is_gpu(hidden):
        return False
    from surgeon.kernels.cross_entropy import can_use

    return not can_use(hidden, bias)


def losses(
    logits: Tensor, labels: Tensor, bias: Tensor | None, scale: float | None, softcap: float | None, *, gradient: bool
) -> Tensor:
    """Cross-entropy of each row; the logits become their gradient (`surgeon.kernels.cross_entropy`)."""
    from surgeon.kernels.cross_entropy import cross_entropy_

    found: Tensor = cross_entropy_(logits, labels, bias, scale or 1.0, softcap or 0.0, gradient)
    return found


def _parts(stored: FourBit | Groups) -> tuple[Any, ...]:
    """A weight as the operators take it."""
    if isinstance(stored, Groups):
        return stored.codes, stored.scale, stored.zero, stored.bits
    nested = (stored.nested.scale, stored.nested.offset) if stored.nested else (None, None)
    return stored.codes, stored.absmax, *nested, *stored.shape, stored.kind


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """That of autocast, where it is on: SDPA, which the kernel stands in for, would be cast."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
