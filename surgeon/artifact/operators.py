"""The attention of an artifact over its pages, and what its operators run as on a GPU.

On a CPU a program runs operator by operator, as it is written. On a GPU the operators of `ON_GPU` become calls of their
kernels (`on_gpu`); the same functions run on tensors without values while an artifact is built, and the launches that
they make there are the binaries that it gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from surgeon import ops, quantised
from surgeon.graph import Graph, copied
from surgeon.kernels import bypass, down_up, int_groups, int_matmul, nf4, nf4_matmul, paged_attend, paged_attention
from surgeon.kernels.pages import put
from surgeon.numerics_int import Groups

FEW_ROWS = 64
"""Rows through experts for which each one's matrix is copied out."""
_LIBRARY = torch.library.Library("surgeon", "FRAGMENT")
_LIBRARY.define(
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor blocks, "
    "Tensor? prefixes, Tensor segments, Tensor slots, Tensor? sinks, *, float scale, int window=0, float softcap=0.0, "
    "bool windowed=True) -> Tensor"
)
_LIBRARY.define("low_rank_down(Tensor x, Tensor a) -> Tensor")
_LIBRARY.define(
    "low_rank_up(Tensor y, Tensor low, Tensor b, Tensor? d, Tensor? gain, int first, float scale) -> Tensor"
)
assert quantised  # registers the linears over codes


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    blocks: Tensor,
    prefixes: Tensor | None,
    segments: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    windowed: bool = True,
    attend: Callable[..., Tensor] = paged_attention.reference,
) -> Tensor:
    """Keys and values of new tokens go to their pages, then their queries meet all of their request's.

    Args:
        q: `[b, h, t, d]`; the rows of the batch are its b · t tokens.
        k: `[b, h_kv, t, d]`.
        v: `[b, h_kv, t, d_v]`.
        k_pages: see `surgeon.kernels.paged_attention`, as all others.
        v_pages: see there.
        blocks: see there.
        prefixes: see there.
        segments: see there.
        slots: where the keys go, `[b · t]`.
        sinks: see there.
        scale: see there.
        window: see there.
        softcap: see there.
        windowed: see there.
        attend: the reference, or a kernel's launch.

    Returns:
        `[b, h, t, d_v]`.
    """
    batch, heads, tokens, _ = q.shape
    rows = [x.transpose(1, 2).reshape(batch * tokens, x.shape[1], x.shape[3]) for x in (q, k, v)]
    put(rows[1], rows[2], k_pages, v_pages, slots)
    options = {"scale": scale, "window": window, "softcap": softcap, "windowed": windowed}
    found = attend(rows[0], k_pages, v_pages, blocks, prefixes, segments, sinks, **options)
    return found.view(batch, tokens, heads, -1).transpose(1, 2)


def longest(tokens: int, heads: int, kv: int, dtype: torch.dtype) -> int:
    """The longest segment that one tile of queries has: one row in decode."""
    return 1 if tokens == 1 else paged_attend.longest(heads, kv, dtype)


def low_rank_down(x: Tensor, a: Tensor) -> Tensor:
    """x Aᵀ of x `[.., in]` and a `[ranks, in]`, as `[splits, n, ranks]`, a sum over splits; here it has one."""
    return F.linear(x, a).flatten(0, -2)[None]


def low_rank_up(
    y: Tensor, low: Tensor, b: Tensor, d: Tensor | None, gain: Tensor | None, first: int, scale: float
) -> Tensor:
    """y + scale · gain ⊙ ((d ⊙ low[first : first + ranks]) Bᵀ) of y `[.., out]` and b `[out, ranks]`."""
    part = low.sum(0)[:, first : first + b.shape[1]].to(b.dtype)
    part = F.linear(part if d is None else part * d, b)
    part = part if gain is None else part * gain
    return y + (part if scale == 1.0 else part * scale).view(y.shape)


def _down(x: Tensor, a: Tensor) -> Tensor:
    if bypass.can_use(x, a, []):
        return low_rank_down(x, a)
    return down_up.launch_down(x.flatten(0, -2), a)


def _up(y: Tensor, low: Tensor, b: Tensor, d: Tensor | None, gain: Tensor | None, first: int, scale: float) -> Tensor:
    if bypass.can_use(y, b, []):
        return low_rank_up(y, low, b, d, gain, first, scale)
    return down_up.launch_up(y.flatten(0, -2), low, b, scale, first, d, gain).view(y.shape)


def _attention(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
    tile = longest(q.shape[2], q.shape[1], k.shape[1], q.dtype)

    def attend(rows: Tensor, k_pages: Tensor, v_pages: Tensor, *given: Any, **more: Any) -> Tensor:
        if paged_attention.can_use(rows, k_pages, v_pages, tile):
            return paged_attention.reference(rows, k_pages, v_pages, *given, **more)
        return paged_attend.launch(rows, k_pages, v_pages, *given, **more, tile=tile)

    return cached_attention(q, k, *rest, **options, attend=attend)


def _nf4_linear(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    out: int,
    inp: int,
    kind: str = "nf4",
) -> Tensor:
    held, rows = nf4.stored(codes, absmax, scale, offset, out, inp, kind), x.flatten(0, -2)
    if not nf4_matmul.can_use(rows, held, bias):
        return nf4_matmul.launch(rows, held, bias).view(*x.shape[:-1], out)
    weight = nf4.reference(held, x.dtype) if nf4.can_use(held, x.dtype) else nf4.launch(held, x.dtype)
    return F.linear(x, weight, bias)


def _int_linear(x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, zero: Tensor, *, bits: int) -> Tensor:
    held, rows = Groups(codes, scale, zero, bits), x.flatten(0, -2)
    if not int_matmul.can_use(rows, held, bias):
        return int_matmul.launch(rows, held, bias).view(*x.shape[:-1], codes.shape[0])
    why = int_groups.can_use(held, x.dtype)
    return F.linear(x, int_groups.reference(held, x.dtype) if why else int_groups.launch(held, x.dtype), bias)


def _expert_linear(
    x: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    """Of few rows without asking how many each expert has: an answer is a wait, and no recorded step may wait."""
    matrices = weight.transpose(1, 2) if transposed else weight
    if x.is_meta:
        return x.new_empty(len(x), matrices.shape[1])
    if len(x) > FEW_ROWS:
        return ops.expert_linear(x, weight, ids, bias, transposed=transposed)
    y = torch.bmm(matrices[ids], x[:, :, None])[:, :, 0]
    return y if bias is None else y + bias[ids]


for _name in ("cached_attention", "low_rank_down", "low_rank_up"):
    _LIBRARY.impl(_name, globals()[_name], "CompositeExplicitAutograd")

ON_GPU: dict[Any, Callable[..., Any]] = {
    torch.ops.surgeon.cached_attention.default: _attention,
    torch.ops.surgeon.low_rank_down.default: _down,
    torch.ops.surgeon.low_rank_up.default: _up,
    torch.ops.surgeon.nf4_linear.default: _nf4_linear,
    torch.ops.surgeon.int_linear.default: _int_linear,
    torch.ops.surgeon.expert_linear.default: _expert_linear,
}
"""Operator → what it runs as where there is a GPU."""


def on_gpu(graph: Graph) -> Graph:
    """The graph with its operators as calls of their kernels."""
    result = graph.copy()
    result.trunk = _swapped(graph.trunk)
    for part, paths in graph.groups():
        result.layers.update(dict.fromkeys(paths, _swapped(part)))
    return result


def _swapped(part: fx.Graph) -> fx.Graph:
    fresh, _ = copied(part)
    for node in fresh.nodes:
        node.target = ON_GPU.get(node.target, node.target)
    return fresh
