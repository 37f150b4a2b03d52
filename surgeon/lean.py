"""Operators whose backward pass keeps less and computes in fewer passes than autograd makes of their parts.

Differentiable once; the results are those of the parts up to rounding, also under autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from surgeon.products import add_times, times, times_transposed

aten = torch.ops.aten
Weight = Tensor | Callable[[torch.dtype], Tensor]


def bypassed(x: Tensor, scales: tuple[float, ...], drops: tuple[float, ...], *tensors: Weight | None) -> Any:
    """y_i = x W_iᵀ + bias_i + s_i (drop_i(x) A_iᵀ) B_iᵀ for several frozen linears with a low-rank bypass on one input.

    Args:
        x: `[.., in]`.
        scales: s_i.
        drops: probability of dropping an input of the bypass; every one draws its own, as dropout of its own would.
        tensors: W_i `[out_i, in]`, bias_i `[out_i]` or None, A_i `[r_i, in]`, B_i `[out_i, r_i]`, for each i in turn.
            W_i may be what makes it in a dtype, from codes: it is made in the forward and again in the backward pass.

    Returns:
        A tuple of y_i `[.., out_i]`, in the autocast dtype or that of x.
    """
    weights, biases = tensors[0::4], tensors[1::4]
    if any(isinstance(t, Tensor) and t.requires_grad for t in (*weights, *biases)):
        sites = zip(scales, drops, strict=True)
        return tuple(_composed(x, s, p, *tensors[4 * i : 4 * i + 4]) for i, (s, p) in enumerate(sites))
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    with torch.autocast(device, enabled=False):
        return tuple(_Bypassed.apply(x, scales, drops, dtype, *tensors))


def _composed(x: Tensor, scale: float, drop: float, weight: Any, bias: Any, a: Any, b: Any) -> Tensor:
    linear = torch.nn.functional.linear
    low = linear(torch.nn.functional.dropout(x, drop) if drop else x, a)
    return linear(x, _made(weight, x.dtype), bias) + linear(low, b) * scale


def _made(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight(dtype)


class _Bypassed(torch.autograd.Function):
    """Keeps x once (in the dtype of the products), drop_i(x) A_iᵀ, which inputs were kept, and no result.

    A weight in codes is held by what makes it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: tuple[float, ...], drops: tuple[float, ...], dtype: torch.dtype, *tensors: Any
    ) -> tuple[Tensor, ...]:
        kept = [_kept(x, p) for p in drops]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        low = _down(rows, [t.to(dtype) for t in tensors[2::4]], kept, drops)
        ranks = [t.shape[0] for t in tensors[2::4]]
        results, weights = [], []
        for i, (scale, part) in enumerate(zip(scales, low.split(ranks, 1), strict=True)):
            weight, bias, _, b = tensors[4 * i : 4 * i + 4]
            value = _made(weight, dtype)
            y = times_transposed(rows, value, None if bias is None else bias.to(dtype))
            results.append(y.addmm_(part, b.to(dtype).t(), alpha=scale).view(*x.shape[:-1], -1))
            weights.append(value if isinstance(weight, Tensor) else None)
            del value
        ctx.makers = [None if isinstance(weight, Tensor) else weight for weight in tensors[0::4]]
        ctx.save_for_backward(rows, low, *weights, *tensors[2::4], *tensors[3::4], *kept)
        ctx.scales, ctx.drops, ctx.ranks, ctx.shape, ctx.dtype = scales, drops, ranks, x.shape, x.dtype
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        count = len(ctx.scales)
        rows, low, *rest = ctx.saved_tensors
        weights, a, b, kept = (rest[i * count : (i + 1) * count] for i in range(4))
        flat = [g.reshape(-1, g.shape[-1]) for g in grads]
        with torch.autocast(rows.device.type, enabled=False):
            slopes = [_turned(g, bi.to(g.dtype)).mul_(s) for g, bi, s in zip(flat, b, ctx.scales, strict=True)]
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = _down_grad_x(slopes, a, kept, ctx.drops)
                for g, weight, make in zip(flat, weights, ctx.makers, strict=True):
                    grad_x = add_times(grad_x, g, weight if make is None else make(g.dtype))
                grad_x = grad_x.to(ctx.dtype).view(ctx.shape)
            grad_a = _down_grad_a(slopes, rows, kept, ctx.drops)
            parts = zip(flat, low.split(ctx.ranks, 1), ctx.scales, strict=True)
            grad_b = [(part.t() @ g).mul_(s).t() for g, part, s in parts]
        found: list[Any] = [grad_x, None, None, None]
        for i in range(count):
            found += [None, None, grad_a[i].to(a[i].dtype), grad_b[i].to(b[i].dtype)]
        return tuple(found)


Kept = list[Tensor | None]


def _kept(x: Tensor, drop: float) -> Tensor | None:
    """Which inputs stay, int8 `[n, in]`: all bits of those, no bit of the others; None for all."""
    if not drop:
        return None
    return (drawn if x.device.type == "cpu" else _bernoulli)(x, drop).view(-1, x.shape[-1])


def _bernoulli(x: Tensor, drop: float) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device).bernoulli_(1 - drop).neg_()


def drawn(x: Tensor, drop: float) -> Tensor:
    """Int8 in the shape of x, 0 with probability `drop` to within 2^-17 and else -1: four of each 64 random bits.

    On a CPU torch's generator takes most of the time of a dropout, a number for every element; this is 5 × faster.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = bits.view(torch.int16)[: x.numel()].ge_(min(round(drop * 2**16), 2**16 - 1) - 2**15)
    return kept.neg_().to(torch.int8).view(x.shape)


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _masked(x: Tensor, kept: Tensor | None) -> Tensor:
    """x with zeros where it is dropped: on a CPU 4 × faster than a selection, 20 × than a product with booleans."""
    return x if kept is None else (x.view(_WORDS[x.itemsize]) & kept).view(x.dtype)


def _down(rows: Tensor, a: list[Tensor], kept: Kept, drops: tuple[float, ...]) -> Tensor:
    """drop_i(x) A_iᵀ beside one another, `[n, Σ r_i]`: one product where nothing is dropped."""
    if not any(drops):
        return rows @ torch.cat(a).t()
    sites = zip(a, kept, drops, strict=True)
    return torch.cat([_masked(rows, k) @ (t / (1 - p)).t() for t, k, p in sites], 1)


def _down_grad_x(slopes: list[Tensor], a: list[Tensor], kept: Kept, drops: tuple[float, ...]) -> Tensor:
    if not any(drops):
        below = slopes[0] if len(slopes) == 1 else torch.cat(slopes)
        return below.t() @ torch.cat([t.to(below.dtype) for t in a])
    parts = [s.t() @ (t.to(s.dtype) / (1 - p)) for s, t, p in zip(slopes, a, drops, strict=True)]
    return functools.reduce(Tensor.add_, map(_masked, parts, kept))


def _down_grad_a(slopes: list[Tensor], rows: Tensor, kept: Kept, drops: tuple[float, ...]) -> Sequence[Tensor]:
    if not any(drops):
        return (slopes[0] if len(slopes) == 1 else torch.cat(slopes)).mm(rows).split([len(s) for s in slopes])
    sites = zip(slopes, kept, drops, strict=True)
    return [(s @ _masked(rows, k)).div_(1 - p) for s, k, p in sites]


def _turned(g: Tensor, b: Tensor) -> Tensor:
    """(g b)ᵀ `[r, n]`. Products with few columns are slow in fp32 on CPU; products with few rows are not."""
    return b.t().contiguous() @ g.t() if g.dtype == torch.float32 else (g @ b).t()


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias, `[.., in]` → `[.., out]`, keeping no input where W and bias are frozen; torch's own where not."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if not frozen or not x.requires_grad or x.numel() == 0:
        return torch.nn.functional.linear(x, weight, bias)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    with torch.autocast(device, enabled=False):
        result: Tensor = _FrozenLinear.apply(x, weight, bias, dtype)
    return result


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        weight = weight.to(dtype)
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        y = times_transposed(rows, weight, None if bias is None else bias.to(dtype))
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            below = times(grad.reshape(-1, grad.shape[-1]), weight)
        return below.view(*grad.shape[:-1], -1).to(ctx.dtype), None, None, None


def rms_normalised(x: Tensor, eps: float) -> Tensor:
    """x / √(mean(x²) + eps) over the last axis, `[.., n]` → `[.., n]`."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float32:
        x = x.float()
    return _RmsNormalised.apply(x, eps)


class _RmsNormalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse)
        return x * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """d/dx: r g − x r³ (g · x) / n with r = 1 / rms."""
        x, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, x).unsqueeze(-1).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return (grad * inverse).addcmul_(x, along), None


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    if gate.shape != up.shape:
        return torch.nn.functional.silu(gate) * up
    return _Gated.apply(gate, up, aten.silu, aten.silu_backward, {})


def gated_gelu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) · up."""
    if gate.shape != up.shape:
        return torch.nn.functional.gelu(gate, approximate=approximate) * up
    options = {"approximate": approximate}
    return _Gated.apply(gate, up, aten.gelu, aten.gelu_backward, options)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Any, slope: Any, options: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.slope, ctx.options = act, slope, options
        return act(gate, **options) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        grad_up = (ctx.act(gate, **ctx.options).mul_(grad)).to(up.dtype) if ctx.needs_input_grad[1] else None
        grad_gate = ctx.slope((grad * up).to(gate.dtype), gate, **ctx.options) if ctx.needs_input_grad[0] else None
        return grad_gate, grad_up, None, None, None
