"""Low-rank bypasses beside linears that read one x (q, k and v; gate and up), forward and backward.

    yᵢ' = yᵢ + scaleᵢ · gain ⊙ ((d ⊙ (x Aᵢᵀ)) Bᵢᵀ)

LoRA has neither d nor gain; VeRA (Kopiczko et al. 2023, eq. 2) has both, and A and B frozen: slices of two matrices
that all sites share, read where they lie. A of all parts is one matrix [ΣR, in], so x goes through one product for all,
which reads it once; each part is then added to its own y in place of three passes over it (product, scale, sum).

Backward, with ∂ the gradient of yᵢ':

    ∂low = scale · (gain ⊙ ∂) B     ∂x = (d ⊙ ∂low) A     ∂A = (d ⊙ ∂low)ᵀ x     ∂B = scale · (gain ⊙ ∂)ᵀ (d ⊙ low)
    ∂d = Σ rows ∂low ⊙ low          ∂gain = scale · Σ ranks ((∂ᵀ (d ⊙ low)) ⊙ B)

∂low and ∂x are the two kernels of the forward with A and B in each other's place; ∂x is summed over the parts in one
product, as A is one matrix. Gradients of weights are plain products, which the library does as well. low is kept: R
numbers for each row.

Replaces: three `torch.nn.functional.linear` and a sum for each part. Library: `torch.addmm` after one linear for all A.
"""

from __future__ import annotations

from typing import Any

import torch

from surgeon.kernels import down_up, jit

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def reference(
    ys: list[torch.Tensor],
    x: torch.Tensor,
    a: torch.Tensor,
    bs: list[torch.Tensor],
    scales: list[float],
    d: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """The equation above.

    Args:
        ys: outputs of the linears `[n, outᵢ]`.
        x: `[n, in]`.
        a: A of all parts, one below the other `[ΣR, in]`.
        bs: `[outᵢ, Rᵢ]`.
        scales: one for each part.
        d: `[R]`, as `gain` with one part only.
        gain: `[out]`.

    Returns:
        yᵢ' in the order of `ys`, and low = x Aᵀ `[n, ΣR]`.
    """
    low = x @ a.T
    found, first = [], 0
    for y, b, scale in zip(ys, bs, scales, strict=True):
        part = low[:, first : first + b.shape[1]]
        part = (part if d is None else part * d) @ b.T
        found.append(y + (part if gain is None else part * gain) * scale)
        first += b.shape[1]
    return [*found, low]


def can_use(x: torch.Tensor, a: torch.Tensor, bs: list[torch.Tensor]) -> str:
    """Why the kernels cannot run on these, "" if they can; then the reference runs in their place."""
    if x.dtype not in _DTYPES or any(w.dtype != x.dtype for w in (a, *bs)):
        return f"dtypes {x.dtype} and {a.dtype}: one of fp32, fp16 and bf16 for all is needed"
    if x.stride(-1) != 1:
        return "rows of x whose elements do not lie side by side"
    return jit.missing()


def launch(
    ys: list[torch.Tensor],
    x: torch.Tensor,
    a: torch.Tensor,
    bs: list[torch.Tensor],
    scales: list[float],
    d: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """`reference` by the kernels."""
    if can_use(x, a, bs):
        return reference(ys, x, a, bs, scales, d, gain)
    low, first, found = down_up.launch_down(x, a), 0, []
    for y, b, scale in zip(ys, bs, scales, strict=True):
        found.append(down_up.launch_up(y, low, b, scale, first, d, gain))
        first += b.shape[1]
    return [*found, low.sum(0).to(x.dtype) if len(low) > 1 else low[0].to(x.dtype)]


def gradients(
    grads: list[torch.Tensor],
    x: torch.Tensor,
    a: torch.Tensor,
    bs: list[torch.Tensor],
    low: torch.Tensor,
    scales: list[float],
    d: torch.Tensor | None,
    gain: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    """(∂x, ∂A, ∂B of every part, ∂d, ∂gain), see above; `low` is the last of `reference`."""
    kernels = x.is_cuda and not can_use(x, a, bs)
    return _gradients(grads, x, a, bs, low, scales, d, gain, _by_kernels if kernels else _by_torch)


def _gradients(
    grads: list[torch.Tensor],
    x: torch.Tensor,
    a: torch.Tensor,
    bs: list[torch.Tensor],
    low: torch.Tensor,
    scales: list[float],
    d: torch.Tensor | None,
    gain: torch.Tensor | None,
    inputs: Any,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor | None, torch.Tensor | None]:
    below, dx = inputs(grads, a, bs, scales, d, gain)
    used = low if d is None else low * d
    da = (below if d is None else below * d).T @ x
    dbs, parts = [], used.split([b.shape[1] for b in bs], 1)
    for grad, part, scale in zip(grads, parts, scales, strict=True):
        dbs.append((grad if gain is None else grad * gain).T @ part * scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    dd = None if d is None else (below * low).sum(0, dtype=wide).to(d.dtype)
    dgain = None if gain is None else ((grads[0].T @ used) * bs[0]).sum(1, dtype=wide).mul(scales[0]).to(gain.dtype)
    return dx, da, dbs, dd, dgain


def _by_torch(
    grads: list[torch.Tensor],
    a: torch.Tensor,
    bs: list[torch.Tensor],
    scales: list[float],
    d: torch.Tensor | None,
    gain: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(∂low of all parts `[n, ΣR]`, ∂x)."""
    below = torch.cat([(g if gain is None else g * gain) @ b * s for g, b, s in zip(grads, bs, scales, strict=True)], 1)
    return below, (below if d is None else below * d) @ a


def _by_kernels(
    grads: list[torch.Tensor],
    a: torch.Tensor,
    bs: list[torch.Tensor],
    scales: list[float],
    d: torch.Tensor | None,
    gain: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [
        down_up.launch_down(grad.contiguous(), b.T, gain).sum(0) * scale
        for grad, b, scale in zip(grads, bs, scales, strict=True)
    ]
    below = torch.cat(parts, 1)
    nothing = grads[0].new_zeros(1, a.shape[1]).expand(len(below), -1)
    return below.to(a.dtype), down_up.launch_up(nothing, below[None], a.T, 1.0, 0, d)


@torch.library.custom_op("surgeon::bypass", mutates_args=(), device_types="cpu")
def bypass(
    ys: list[torch.Tensor],
    x: torch.Tensor,
    a: torch.Tensor,
    bs: list[torch.Tensor],
    scales: list[float],
    d: torch.Tensor | None,
    gain: torch.Tensor | None,
) -> list[torch.Tensor]:
    """`reference` on a CPU, two kernels on a GPU, with the same arguments, none left out; differentiable."""
    return reference(ys, x, a, bs, scales, d, gain)


bypass.register_kernel("cuda")(launch)


@bypass.register_fake
def _(
    ys: list[torch.Tensor], x: torch.Tensor, a: torch.Tensor, bs: list[torch.Tensor], *rest: object
) -> list[torch.Tensor]:
    return [*(torch.empty_like(y, memory_format=torch.contiguous_format) for y in ys), x.new_empty(len(x), len(a))]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    _, x, a, bs, scales, d, gain = inputs
    ctx.save_for_backward(x, a, output[-1], d, gain, *bs)
    ctx.scales = scales


def _backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    x, a, low, d, gain, *bs = ctx.saved_tensors
    given = list(grads[:-1])  # low is no output that a loss may read
    dx, da, dbs, dd, dgain = gradients(given, x, a, bs, low, ctx.scales, d, gain)
    return given, dx, da, dbs, None, dd, dgain


bypass.register_autograd(_backward, setup_context=_keep)
