"""Attention, RotaryEmbedding and RMSNormalization of ONNX's opset 23, as functions of torch that lower to them.

The mask goes in as a sum, finite and of every query's and key's size. A boolean mask would be less, but ONNX Runtime
up to 1.23 computes NaN for a row that sees no key, which is what padding on the left is; ONNX itself said NaN before it
said 0. Finite, such a row is a mean of values that nobody reads. `is_causal` is not used: whether it counts earlier
tokens differs between runtimes.
"""

from __future__ import annotations

from typing import Any

import torch

from surgeon import ops
from surgeon.lower.onnx.group_query import biased, hidden

VERSION = 23


def added(
    mask: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype, causal: bool, window: int, chunk: int, prefix: int
) -> torch.Tensor:
    """What is added to the scores `[b, 1, t, s]`.

    Args:
        mask: `[b, s]`, True where a key is a token.
        ids: `[b, t]`, for their number.
        dtype: of the scores.
        causal: see `surgeon.ops.visible`, as all that follows.
        window: see there.
        chunk: see there.
        prefix: see there.
    """
    (batch, keys), queries = mask.shape, ids.shape[1]
    options: dict[str, Any] = {"causal": causal, "window": window, "chunk": chunk, "prefix": prefix}
    seen = ops.visible(mask, queries, keys, device=mask.device, **options)
    assert seen is not None
    return hidden(seen, dtype).expand(batch, 1, queries, keys)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
) -> torch.Tensor:
    """`surgeon.ops.attention` as the operator; the arguments are its own, keys and values with all that came before."""
    kind, (batch, heads, queries, _), keys = v.dtype, q.shape, k.shape[2]
    options: dict[str, Any] = {"causal": causal, "window": window, "chunk": chunk, "prefix": prefix}
    seen = ops.visible(mask, queries, keys, device=q.device, **options)
    total = None if seen is None else hidden(seen, kind)
    if bias is not None:
        total = biased(torch.zeros((), dtype=kind, device=q.device) if total is None else total, bias)
    given = [q.to(kind), k.to(kind), v]
    if total is not None:  # ONNX Runtime wants it of every query's and key's size
        total = total[(None,) * (4 - total.dim())]
        given.append(total.expand(*total.shape[:2], queries, keys))
    made = torch.onnx.ops.symbolic(
        "Attention", given, {"scale": scale}, dtype=kind, shape=[batch, heads, queries, v.shape[3]], version=VERSION
    )
    return made.to(q.device)  # symbolic operators trace as tensors of the CPU


def cached(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor,
    past_v: torch.Tensor,
    added: torch.Tensor,
    *,
    heads: int,
    scale: float,
) -> list[torch.Tensor]:
    """The attention `[b, t, h d]`, and keys and values with their past `[b, h_kv, s, d]`.

    Args:
        q: queries of the new tokens `[b, t, h d]`.
        k: their keys `[b, t, h_kv d]`.
        v: their values.
        past_k: keys of earlier tokens `[b, h_kv, s - t, d]`.
        past_v: their values.
        added: to the scores, see above.
        heads: h.
        scale: of the scores.
    """
    kind, (batch, shared, _, size), keys = past_v.dtype, past_v.shape, added.shape[3]
    given = [q.to(kind), k.to(kind), v.to(kind), added, past_k, past_v]
    options: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": shared, "scale": scale}
    shapes = [[batch, q.shape[1], heads * size], [batch, shared, keys, past_k.shape[3]], [batch, shared, keys, size]]
    made = torch.onnx.ops.symbolic_multi_out(
        "Attention", given, options, dtypes=[kind] * 3, shapes=shapes, version=VERSION
    )
    return [x.to(q.device) for x in made]


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, heads: int, pairs: bool) -> torch.Tensor:
    """RotaryEmbedding: x `[b, t, h d]` turned by the angles `[b, t, r / 2]`; of heads wider than r the rest stays."""
    options: dict[str, Any] = {"num_heads": heads, "rotary_embedding_dim": 2 * cos.shape[2], "interleaved": int(pairs)}
    given = [x, cos.to(x.dtype), sin.to(x.dtype)]
    made = torch.onnx.ops.symbolic(
        "RotaryEmbedding", given, options, dtype=x.dtype, shape=list(x.shape), version=VERSION
    )
    return made.to(x.device)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNormalization: x `[.., n]` over the root of its mean square, times the weight `[n]`."""
    options: dict[str, Any] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    made = torch.onnx.ops.symbolic(
        "RMSNormalization", [x, weight], options, dtype=x.dtype, shape=list(x.shape), version=VERSION
    )
    return made.to(x.device)
