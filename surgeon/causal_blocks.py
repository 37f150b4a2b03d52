"""Causal attention for training on a CPU, in blocks of query rows: ordinary products over the keys a block can see.

For rows i..e of the queries, with S = scale · Q[i:e] K[:e]ᵀ, P = softmax(S) under the triangle and dO the gradient:

    O[i:e] = P V[:e]          dV[:e] += Pᵀ dO[i:e]        dS = P ∘ (dP − rowsum(P ∘ dP)),  dP = dO[i:e] V[:e]ᵀ
    dQ[i:e] = scale · dS K[:e]                            dK[:e] += scale · dSᵀ Q[i:e]

Nothing but q, k and v is kept. For short texts this is faster than torch's flash kernel for CPUs, whose tiles are
larger than what the triangle leaves of them: at 512 tokens 0.8 of its time in fp32 and 0.6 in bf16, forward and
backward together (python -m benchmarks.causal_blocks). Scores and their gradients are fp32, as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 64
LENGTHS = {torch.float32: range(384, 769), torch.bfloat16: range(ROWS + 1, 769)}
"""Lengths at which this is faster (benchmarks/causal_blocks.py)."""


def can_use(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> bool:
    """Whether a causal attention of as many queries as keys is one to compute here: it trains, on a CPU, short."""
    if q.device.type != "cpu" or dropout_p or not torch.is_grad_enabled():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    return q.shape[2] in LENGTHS.get(dtype, ()) and any(x.requires_grad for x in (q, k, v))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ, keys up to the query's own) v.

    Args:
        q: `[b, h, t, d]`.
        k: `[b, h_kv, t, d]`, each head serving h / h_kv consecutive query heads.
        v: `[b, h_kv, t, d_v]`.
        scale: factor on the scores.

    Returns:
        `[b, h, t, d_v]`, in the autocast dtype or that of q.
    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        result: Tensor = _CausalBlocks.apply(q, k, v, scale)
    return result


class _CausalBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        work = _Heads(q, k, v, scale)
        result = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype)
        grouped = work.grouped(result)
        for rows in work.blocks():
            weights = work.weights(rows).to(v.dtype)
            grouped[:, :, rows] = torch.bmm(weights, work.v[:, : rows.stop]).unflatten(1, (work.repeat, -1))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        work = _Heads(q, k, v, ctx.scale)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=torch.float32).flatten(0, 1) for x in (k, v))
        grouped_q, grouped = work.grouped(grad_q), work.grouped(grad)
        values = work.v.float().transpose(1, 2)
        for rows in work.blocks():
            weights = work.weights(rows)
            above = grouped[:, :, rows].flatten(1, 2)
            _add_product(grad_v[:, : rows.stop], weights.to(v.dtype).transpose(1, 2), above)
            slopes = torch.bmm(above.float(), values[:, :, : rows.stop])
            slopes = torch._softmax_backward_data(slopes, weights, -1, slopes.dtype).mul_(ctx.scale).to(q.dtype)
            grouped_q[:, :, rows] = torch.bmm(slopes, work.k[:, : rows.stop]).unflatten(1, (work.repeat, -1))
            _add_product(grad_k[:, : rows.stop], slopes.transpose(1, 2), work.rows_of_q(rows))
        return grad_q, grad_k.view(k.shape).to(k.dtype), grad_v.view(v.shape).to(v.dtype), None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the dtype of the total."""
    if a.dtype == total.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


class _Heads:
    """q, k and v with the heads of every text in the batch: `[b · h_kv, ..]`; query heads of one K/V head together."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.repeat = q.shape[1] // k.shape[1]
        self.q = self.grouped(q)
        self.k, self.v = k.flatten(0, 1), v.flatten(0, 1)
        self.exact_k = self.k.float().transpose(1, 2)
        self.scale = scale
        self.hidden = torch.full((ROWS, ROWS), float("-inf")).triu(1)

    def grouped(self, x: Tensor) -> Tensor:
        """`[b, h, t, d]` → `[b · h_kv, h / h_kv, t, d]`."""
        return x.unflatten(1, (-1, self.repeat)).flatten(0, 1)

    def blocks(self) -> Iterator[slice]:
        """The rows of each block."""
        length = self.q.shape[2]
        return (slice(begin, min(begin + ROWS, length)) for begin in range(0, length, ROWS))

    def rows_of_q(self, rows: slice) -> Tensor:
        """`[b · h_kv, h / h_kv · rows, d]`."""
        return self.q[:, :, rows].flatten(1, 2)

    def weights(self, rows: slice) -> Tensor:
        """P of a block, fp32 `[b · h_kv, h / h_kv · rows, e]`."""
        q = self.rows_of_q(rows).float()
        scores = torch.baddbmm(q.new_empty(()), q, self.exact_k[:, :, : rows.stop], beta=0, alpha=self.scale)
        count = rows.stop - rows.start
        scores.unflatten(1, (self.repeat, count))[..., rows] += self.hidden[:count, :count]
        return torch.softmax(scores, -1)
