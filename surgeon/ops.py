"""The operators that surgeon adds to a captured graph, registered as `torch.ops.surgeon.*`.

`attention` is the one node per attention that every attention pass edits. `enter`, `leave` and `layers` exist only
while a model is captured (see `surgeon.capture`). The attention kernel is CompositeImplicitAutograd over torch's own
SDPA: it stays one node through `torch.export`, trains, and works under autocast.
"""

from __future__ import annotations

import functools
import weakref

import torch
from torch.nn import functional as F

from surgeon import causal_blocks, on_gpu
from surgeon.segments import segmented

_LIBRARY = torch.library.Library("surgeon", "DEF")

_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? bias=None, Tensor? sinks=None, *, float scale, "
    "bool causal=False, int window=0, int chunk=0, float softcap=0.0, float dropout_p=0.0, str role='self', "
    "int prefix=0, int group=0, bool wrap=False) -> Tensor"
)
_LIBRARY.define(
    "expert_linear(Tensor x, Tensor weight, Tensor ids, Tensor? bias=None, *, bool transposed=False) -> Tensor"
)
_LIBRARY.define("bfloat16(Tensor x) -> Tensor")
_LIBRARY.define("enter(Tensor[] xs, str path) -> Tensor[]")
_LIBRARY.define("leave(Tensor[] xs, str path) -> Tensor[]")
_LIBRARY.define("layers(Tensor[] xs, SymInt[] sizes, int run) -> Tensor[]")


def key_offset(queries: int, keys: int) -> int:
    """Index of the first query among the keys: queries are the last ones (K/V cache, prefix columns)."""
    return keys - queries


def visible(
    mask: torch.Tensor | None,
    queries: int,
    keys: int,
    *,
    causal: bool,
    window: int,
    chunk: int,
    device: torch.device,
    prefix: int = 0,
) -> torch.Tensor | None:
    """Which key each query may see, `[b | 1, 1, t, s]` boolean, or None where every query sees every key.

    Args:
        mask: key padding `[b, s]`, True where the key is a token.
        queries: number of queries t; they are the last t of the s positions.
        keys: number of keys s.
        causal: key position <= query position.
        window: with `causal`, key > query - window; without, |query - key| <= window. 0 means no window.
        chunk: query and key lie in the same chunk of this length, counted from the first unpadded key. 0 means none.
        device: where the result lives.
        prefix: number of first keys that every query sees, whatever the window and chunk, which are counted after them.
    """
    allowed = None if mask is None else mask.to(torch.bool)[:, None, None, :]
    if not (causal or window or chunk):
        return allowed
    key = torch.arange(keys, device=device) - prefix
    query = torch.arange(queries, device=device)[:, None] + (key_offset(queries, keys) - prefix)
    padding = _leading_padding(mask[:, prefix:])[:, None, None] if chunk and mask is not None else 0
    seen = pattern(query, key, padding, causal=causal, window=window, chunk=chunk)
    if prefix:
        seen = seen | (key < 0)
    seen = seen[:, None] if seen.dim() == 3 else seen[None, None]
    return seen if allowed is None else allowed & seen


def pattern(
    query: torch.Tensor, key: torch.Tensor, padding: torch.Tensor | int, *, causal: bool, window: int, chunk: int
) -> torch.Tensor:
    """The part of `visible` that depends on positions alone, for broadcastable index tensors and leading padding."""
    rules = []
    if causal:
        rules.append(key <= query)
    if window:
        rules.append(key > query - window if causal else (key - query).abs() <= window)
    if chunk:
        rules.append(_floor(key - padding, chunk) == _floor(query - padding, chunk))
    return functools.reduce(torch.logical_and, rules) if rules else (query >= 0) & (key >= 0)


def _floor(position: torch.Tensor, chunk: int) -> torch.Tensor:
    return torch.div(position, chunk, rounding_mode="floor")


def _leading_padding(mask: torch.Tensor) -> torch.Tensor:
    """Number of padded keys before the first token, `[b]`."""
    return (mask.to(torch.int64).cumsum(-1) == 0).sum(-1)


def _tracing(x: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor)


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[b, h_kv, s, d]` → `[b, heads, s, d]`, each K/V head serving heads / h_kv consecutive query heads."""
    batch, kv_heads, keys, size = x.shape
    if kv_heads == heads:
        return x
    return x[:, :, None].expand(batch, kv_heads, heads // kv_heads, keys, size).reshape(batch, heads, keys, size)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    role: str = "self",
    prefix: int = 0,
    group: int = 0,
    wrap: bool = False,
) -> torch.Tensor:
    """softmax(softcap(scale · q kᵀ) + bias, over visible keys and the sink) v, a row that sees no key giving 0.

    Args:
        q: queries `[b, h, t, d]`.
        k: keys `[b, h_kv, s, d]`, s >= t; the queries are the last t positions.
        v: values `[b, h_kv, s, d_v]`.
        mask: key padding `[b, s]`, True where the key is a token.
        bias: additive float, or boolean (True = visible), broadcastable to `[b, h, t, s]`.
        sinks: one extra logit per head `[h]` that takes softmax mass and has no value (gpt-oss).
        scale: factor on the scores.
        causal: see `visible`, as `window` and `chunk`.
        window: width of the sliding window, 0 for none.
        chunk: length of the attention chunks, 0 for none.
        softcap: c in c · tanh(scores / c), 0 for none (Gemma 2).
        dropout_p: probability of dropping an attention weight.
        role: "self", or "cross" when k and v come from an encoder. Read by passes, not by the arithmetic.
        prefix: number of first keys that every query sees, see `visible`.
        group: length of the segments of shifted sparse attention, 0 for none; `wrap` its form: see `surgeon.segments`.
        wrap: see `group`.

    Returns:
        `[b, h, t, d_v]`.
    """
    queries, keys, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if mask is not None and not _tracing(q) and _hides_nothing(mask):
        mask = None  # a mask that hides nothing would only cost the [t, s] additions
    if group:
        bare = bias is None and sinks is None and not (softcap or dropout_p or prefix)
        pattern_of = {"scale": scale, "group": group, "causal": causal, "wrap": wrap, "window": window}
        found = on_gpu.segmented_attention(q, k, v, mask, plain=bare, **pattern_of)
        if found is not None:
            return found
        options = {"scale": scale, "causal": causal, "window": window, "softcap": softcap, "dropout_p": dropout_p}
        attend = functools.partial(attention, **options, prefix=prefix)  # type: ignore[arg-type]
        return segmented(q, k, v, mask, bias, sinks, group=group, wrap=wrap, prefix=prefix, attend=attend)
    if not _tracing(q):
        if window and window >= keys:
            window = 0
        if queries == 1 and not window:
            causal = False  # the last position sees every key
    plain = bias is None and sinks is None and not softcap
    if plain and mask is None and not window and not chunk and (not causal or _square(q, queries, keys)):
        if causal and not _tracing(q) and causal_blocks.can_use(q, k, v, dropout_p):
            return causal_blocks.causal_attention(q, k, v, scale)
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    seen = visible(mask, queries, keys, causal=causal, window=window, chunk=chunk, device=q.device, prefix=prefix)
    if bias is not None and bias.dtype == torch.bool:
        seen, bias = (bias if seen is None else seen & bias), None
    if sinks is None and not softcap and not _is_exact(bias, q):
        added = _joined(seen, bias, q)
        return F.scaled_dot_product_attention(q, k, v, added, dropout_p, scale=scale, enable_gqa=grouped)
    k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    return _explicit(q, k, v, seen, bias, sinks, scale, softcap, dropout_p)


_seen_mask: tuple[weakref.ref[torch.Tensor], int, bool] | None = None


def _hides_nothing(mask: torch.Tensor) -> bool:
    """Whether every key is a token, asked once for all layers that read one mask: on a GPU an answer is a wait."""
    global _seen_mask
    if mask.is_inference():
        return bool(mask.all())
    known = _seen_mask
    if known is None or known[0]() is not mask or known[1] != mask._version:
        known = _seen_mask = (weakref.ref(mask), mask._version, bool(mask.all()))
    return known[2]


def _square(q: torch.Tensor, queries: int, keys: int) -> bool:
    """SDPA's own causal triangle is anchored top left, which is ours only when there are as many keys as queries."""
    return not _tracing(q) and queries == keys


def _joined(seen: torch.Tensor | None, bias: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    if bias is None or seen is None:
        return seen if bias is None else bias.to(q.dtype)
    return bias.to(q.dtype).masked_fill(~seen, float("-inf"))


def _is_exact(bias: torch.Tensor | None, q: torch.Tensor) -> bool:
    """Whether a bias in fp32 is one row for all queries: ALiBi grows with the text past what bf16 can tell apart."""
    if bias is None or bias.dtype != torch.float32 or q.dtype == torch.float32:
        return False
    return bias.shape[-2] == 1


def _explicit(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> torch.Tensor:
    """Attention with what SDPA has no argument for: soft caps, sinks, fp32 biases. The softmax is taken in fp32."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float()
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    if seen is not None:
        weights = weights.masked_fill(~seen, 0.0)
    weights = F.dropout(weights.to(v.dtype), dropout_p) if dropout_p else weights.to(v.dtype)
    return weights @ v


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """y[i] = W[ids[i]] x[i] + bias[ids[i]]: every row through the expert it was sent to.

    Args:
        x: rows `[n, in]`, those of one expert together.
        weight: `[experts, out, in]`, or `[experts, in, out]` if `transposed`.
        ids: expert of each row `[n]`, ascending.
        bias: `[experts, out]`.
        transposed: see `weight`.

    Returns:
        `[n, out]`.
    """
    matrices = weight.transpose(1, 2) if transposed else weight
    if _tracing(x):
        y = torch.bmm(matrices[ids], x[:, :, None])[:, :, 0]
        return y if bias is None else y + bias[ids]
    counts = torch.bincount(ids, minlength=len(matrices)).tolist()
    rows = x.split(counts)
    parts = [
        F.linear(rows[i], matrices[i], None if bias is None else bias[i]) for i, count in enumerate(counts) if count
    ]
    return torch.cat(parts) if parts else x.new_empty(0, matrices.shape[1])


def bfloat16(x: torch.Tensor) -> torch.Tensor:
    """x in bf16 where a model's own code says so, whatever the dtype of the model (Falcon's ALiBi)."""
    return x.to(torch.bfloat16)


_LIBRARY.impl("bfloat16", bfloat16, "CompositeImplicitAutograd")
_LIBRARY.impl("attention", attention, "CompositeImplicitAutograd")
_LIBRARY.impl("expert_linear", expert_linear, "CompositeImplicitAutograd")
