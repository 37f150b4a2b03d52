"""Cross-entropy and its gradient over a chunk of logits, in place: the middle of `surgeon.loss`.

    z = cap · tanh(scale · (l + bias) / cap)        (without cap: scale · (l + bias))
    loss_i = logsumexp(z_i) − z_i[y_i]              l_ij ← scale · (1 − (z_ij / cap)²) · (softmax(z_i)_j − [j = y_i])

l `[c, v]` are the products of c tokens with the head's weight, which a library made; after the kernel they are the
gradient of Σ loss in l, which a library multiplies with the weight and the hidden states. So one pass over the chunks
gives the loss and the gradients of hidden, weight and bias, and no `[tokens, v]` tensor ever exists
(`surgeon.loss.linear_cross_entropy`).

Tiles: a program owns a row and walks over it twice, BV logits at a time: once for the running maximum and sum of
exponentials, once to turn logits into gradients. It reads 2 · v and writes v values of the logits' own dtype, with fp32
in between; the second reading mostly finds the row in the L2. A thread replaces only values that it alone has read.
torch takes 6 passes in fp32 for the same. The products stay with the library: at 2 · 3 · c · v · h operations for
3 · c · v values moved they are not what a fused kernel wins.

Library: Liger's fused_linear_cross_entropy, which is built the same way but knows no replaced rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.kernels.aot import Variant
from surgeon.kernels.jit import Float, Int, Ptr, Tile, kernel, missing
from surgeon.kernels.operators import operator

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 4096
WARPS = 8


@kernel()
def head_logits(
    logits: Ptr, bias: Ptr, column: Tile, inside: Tile, scale: Float, cap: Float,
    BIASED: tl.constexpr, CAPPED: tl.constexpr,
) -> Tile:  # fmt: skip
    """z of some columns of a row, fp32."""
    z = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    z *= scale
    if CAPPED:
        z = cap * (1.0 - 2.0 / (tl.exp(2.0 * z / cap) + 1.0))  # tanh, which Triton has in no interpreted form
    return z


@kernel("rows")
def cross_entropy_kernel(
    logits: Ptr, bias: Ptr, labels: Ptr, losses: Ptr, scale: Float, cap: Float, rows: Int, V: Int, stride: Int,
    BV: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
) -> None:  # fmt: skip
    """The loss of a row, and its gradient in place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    label = tl.load(labels + row)
    top, total = tl.full((BV,), float("-inf"), tl.float32), tl.zeros((BV,), tl.float32)
    own = tl.zeros((BV,), tl.float32)
    for begin in range(0, V, BV):
        column = begin + tl.arange(0, BV)
        z = head_logits(at, bias, column, column < V, scale, cap, BIASED, CAPPED)
        own += tl.where(column == label, z, 0.0)
        z = tl.where(column < V, z, float("-inf"))
        higher = tl.maximum(top, z)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(z - safe)
        top = higher
    most = tl.max(top, 0)
    lse = most + tl.log(tl.sum(total * tl.exp(top - most), 0))
    tl.store(losses + row, lse - tl.sum(own, 0))
    if GRADIENT:
        for begin in range(0, V, BV):
            column = begin + tl.arange(0, BV)
            z = head_logits(at, bias, column, column < V, scale, cap, BIASED, CAPPED)
            slope = (tl.exp(z - lse) - tl.where(column == label, 1.0, 0.0)) * scale
            if CAPPED:
                slope *= 1.0 - (z / cap) * (z / cap)
            tl.store(at + column, slope.to(logits.dtype.element_ty), mask=column < V)


def reference(
    logits: Tensor, labels: Tensor, bias: Tensor | None, scale: float, softcap: float, gradient: bool
) -> Tensor:
    """The losses `[c]` in fp32 (fp64 for fp64), and the gradient in place of the logits if asked for."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = scale * (logits.to(wide) if bias is None else logits.to(wide) + bias)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    log_p = torch.log_softmax(z, -1)
    if gradient:
        slope = log_p.exp() - F.one_hot(labels, logits.shape[1])
        chain = scale * (1 - (z / softcap) ** 2) if softcap else scale
        logits.copy_(slope * chain)
    return -log_p.gather(1, labels[:, None]).squeeze(1)


def can_use(logits: Tensor, bias: Tensor | None) -> str:
    """Why the kernel does not take the logits, "" if it does."""
    if logits.dtype not in DTYPES:
        return f"logits in {logits.dtype}"
    if logits.stride(1) != 1:
        return "rows of logits that are not contiguous"
    if bias is not None and not bias.is_contiguous():
        return "a bias that is not contiguous"
    return missing()


def launch(logits: Tensor, labels: Tensor, bias: Tensor | None, scale: float, softcap: float, gradient: bool) -> Tensor:
    """See `reference`."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    cross_entropy_kernel.launch(
        logits=logits, bias=logits if bias is None else bias, labels=labels, losses=losses, scale=float(scale),
        cap=float(softcap), rows=len(logits), V=logits.shape[1], stride=logits.stride(0), BIASED=bias is not None,
        CAPPED=softcap > 0, GRADIENT=gradient, BV=min(BLOCK, 1 << (logits.shape[1] - 1).bit_length()), warps=WARPS,
    )  # fmt: skip
    return losses


cross_entropy_ = operator(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor? bias, float scale, float softcap, bool gradient) "
    "-> Tensor",
    launch=launch,
    reference=reference,
    fake=lambda logits, labels, *rest: logits.new_empty(labels.shape, dtype=torch.float32),
)
"""The losses `[c]`; the logits become the gradient of their sum."""


def _variant(dtype: str, capped: bool, gradient: bool = True) -> Variant:
    constants = {"BV": BLOCK, "BIASED": False, "CAPPED": capped, "GRADIENT": gradient}
    label = f"{dtype}{'-capped' if capped else ''}{'' if gradient else '-loss'}"
    signature = f"*{dtype} *{dtype} *i64 *fp32 fp32 fp32 i32 i32 i32"
    aligned = frozenset({"V", "stride"})
    return Variant(cross_entropy_kernel, label, signature, constants, WARPS, 2, aligned)


VARIANTS = (
    _variant("bf16", True),
    *(_variant(dtype, False) for dtype in ("bf16", "fp16", "fp32")),
    _variant("bf16", False, False),
)
