"""com.microsoft.GroupQueryAttention and what it is given, as functions of torch that lower to ONNX operators."""

from __future__ import annotations

from typing import Any

import torch

from surgeon import ops


def total(mask: torch.Tensor) -> torch.Tensor:
    """How many tokens there are with those of the past, `[1]`: as many as the mask `[b, s]` has."""
    made = torch.onnx.ops.symbolic("Shape", [mask], {"start": 1, "end": 2}, dtype=torch.int64, shape=[1])
    return made.to(mask.device).to(torch.int32)  # symbolic operators trace as tensors of the CPU


def lengths(mask: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The place of every row's last token `[b]`; padding counts, it is hidden by a sum on the scores."""
    return (total - 1).expand(mask.shape[0])


def added(mask: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype, chunk: int = 0) -> torch.Tensor:
    """What is added to the scores `[b, 1, t, s]`: half the lowest number, so that no sum of it is infinite.

    Args:
        mask: `[b, s]`, True where a key is a token.
        ids: `[b, t]`, for their number.
        dtype: of the scores.
        chunk: see `surgeon.ops.visible`.
    """
    seen = ops.visible(mask, ids.shape[1], mask.shape[1], causal=False, window=0, chunk=chunk, device=mask.device)
    assert seen is not None
    return hidden(seen, dtype).expand(mask.shape[0], 1, ids.shape[1], mask.shape[1])


def biased(added: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Both sums; a boolean bias `[b | 1, h | 1, t, s]` is False where a key is not seen."""
    more = hidden(bias, added.dtype) if bias.dtype == torch.bool else bias.to(added.dtype)
    return added + more


def attention(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    past_k: torch.Tensor,
    past_v: torch.Tensor,
    lengths: torch.Tensor,
    total: torch.Tensor,
    added: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    pairs: bool = False,
) -> list[torch.Tensor]:
    """The attention `[b, t, h d]`, and keys and values with their past `[b, h_kv, s, d]`.

    Args:
        q: queries of the new tokens `[b, t, h d]`, or, without k and v, all three one after the other.
        k: their keys `[b, t, h_kv d]`.
        v: their values.
        past_k: keys of earlier tokens `[b, h_kv, s - t, d]`.
        past_v: their values.
        lengths: see above.
        total: see above.
        added: to the scores, see above.
        cos: of the angles that queries and keys are turned by, `[positions, r / 2]`; positions are places in the row.
        sin: of the same.
        sinks: `[h]`, a score per head whose share is dropped.
        heads: h.
        scale: of the scores.
        window: keys that a query sees, 0 for all.
        softcap: of the scores, 0 for none.
        pairs: see `surgeon.lower.onnx.rotary.Rotation`.
    """
    kind, (batch, shared, _, size) = past_v.dtype, past_v.shape
    rows = [x if x is None else x.to(kind) for x in (q, k, v)]
    given = [*rows, past_k, past_v, lengths, total, cos, sin, None, added]
    given += [] if sinks is None else [sinks.to(kind)]
    options: dict[str, Any] = {"num_heads": heads, "kv_num_heads": shared, "scale": scale}
    options |= {"local_window_size": window} if window else {}
    options |= {"softcap": softcap} if softcap else {}
    options |= {} if cos is None else {"do_rotary": 1, "rotary_interleaved": int(pairs)}
    cache = [batch, shared, added.shape[3], size]
    made = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention", given, options, dtypes=[kind] * 3,
        shapes=[[batch, q.shape[1], heads * size], cache, cache], version=1,
    )  # fmt: skip
    return [x.to(q.device) for x in made]


def rotated(
    x: torch.Tensor,
    places: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    heads: int,
    pairs: bool,
) -> torch.Tensor:
    """com.microsoft.RotaryEmbedding: x `[b, t, h d]` turned by the angles in rows `places` `[b, t]` of the tables."""
    options: dict[str, Any] = {"num_heads": heads, "rotary_embedding_dim": 2 * cos.shape[1], "interleaved": int(pairs)}
    given = [x, places, cos.to(x.dtype), sin.to(x.dtype)]
    made = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding", given, options, dtype=x.dtype, shape=list(x.shape), version=1
    )
    return made.to(x.device)


def hidden(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a key is seen, half the lowest number where it is not."""
    none = torch.scalar_tensor(0.0, dtype=dtype, device=seen.device)
    low = torch.scalar_tensor(torch.finfo(dtype).min / 2, dtype=dtype, device=seen.device)
    return torch.where(seen, none, low)
