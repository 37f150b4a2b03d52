"""Causal attention with its K/V cache as com.microsoft.GroupQueryAttention, which owns the cache.

The operator reads the new keys and values and those of earlier tokens, and returns the attention and all of them: the
runtime may keep both in one buffer (`past_present_share_buffer`), so nothing may ask how long the past's tensor is; the
length is that of the attention mask. Padding, on either side, goes in as a sum on the scores: what the operator knows
of lengths alone (`seqlens_k`) would be wrong for a batch padded on the left.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon import ops
from surgeon.graph import Graph, copied, sweep, val
from surgeon.sites import has_argument
from surgeon.wiring import inputs_of

aten = torch.ops.aten
MULTIPLE = 8
"""What the size of a head has to be a multiple of."""


@dataclass(frozen=True)
class Fused:
    """A graph whose attentions are the operator, or the graph as it was.

    Attributes:
        graph: the graph.
        reasons: why it is as it was: reason → paths of the layers.
    """

    graph: Graph
    reasons: Mapping[str, Sequence[str]]

    @property
    def fused(self) -> bool:
        """Whether the attentions are the operator."""
        return not self.reasons


def fuse(graph: Graph) -> Fused:
    """Put the operator in the place of every attention of a graph with a K/V cache, or of none.

    Runtimes that keep past and present in one buffer need all attentions to do so.
    """
    reasons: dict[str, list[str]] = {}
    for part, paths in [(graph.trunk, ["the trunk"]), *graph.groups()]:
        for node in _attentions(part):
            why = "it is in no layer" if part is graph.trunk else _unfit(graph, node)
            if why:
                reasons.setdefault(why, []).extend(paths)
    if not any(_attentions(part) for part, _ in graph.groups()):
        reasons["the model has no attention that surgeon knows"] = ["the model"]
    if reasons:
        return Fused(graph, reasons)
    made = graph.copy()
    for shared, paths in graph.groups():
        part, _ = copied(shared)
        for node in _attentions(part):
            _replace(part, node)
        sweep(part)
        made.layers.update(dict.fromkeys(paths, part))
    made.trunk, _ = copied(graph.trunk)
    _measure_by_mask(made.trunk)
    return Fused(made, {})


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor,
    past_v: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    heads: int,
    shared: int,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    **_: Any,
) -> list[torch.Tensor]:
    """The attention `[b, h, t, d]`, and keys and values with their past `[b, h_kv, s, d]`.

    Args:
        q: queries of the new tokens `[b, h, t, d]`.
        k: their keys `[b, h_kv, t, d]`.
        v: their values.
        past_k: keys of earlier tokens `[b, h_kv, s - t, d]`.
        past_v: their values.
        mask: `[b, s]`, True where a key is a token.
        bias: added to the scores, or where False not seen, `[b | 1, h | 1, t, s]`.
        sinks: `[h]`, a score per head whose share is dropped.
        heads: h.
        shared: h_kv.
        scale: of the scores.
        window: keys that a query sees, 0 for all.
        chunk: see `surgeon.ops.visible`.
        softcap: of the scores, 0 for none.
    """
    kind, batch, size = v.dtype, q.shape[0], q.shape[3]
    added = _added(mask, bias, chunk, q.shape[2], kind)
    lengths = torch.full((batch,), mask.shape[1] - 1, dtype=torch.int32)
    total = torch.full((), mask.shape[1], dtype=torch.int32)
    rows = [x.to(kind).transpose(1, 2).flatten(2) for x in (q, k, v)]
    given = [*rows, past_k, past_v, lengths, total, None, None, None, added]
    given += [] if sinks is None else [sinks.to(kind)]
    options: dict[str, Any] = {"num_heads": heads, "kv_num_heads": shared, "scale": scale}
    options |= {"local_window_size": window} if window else {}
    options |= {"softcap": softcap} if softcap else {}
    cache = [batch, shared, mask.shape[1], size]
    made = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention", given, options, dtypes=[kind] * 3,
        shapes=[[batch, q.shape[2], heads * size], cache, cache], version=1,
    )  # fmt: skip
    result, keys, values = (x.to(q.device) for x in made)  # symbolic operators trace as tensors of the CPU
    return [result.unflatten(2, (heads, size)).transpose(1, 2), keys, values]


def _added(mask: torch.Tensor, bias: torch.Tensor | None, chunk: int, queries: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores, `[b, h | 1, t, s]`: half the lowest number, so that no sum of it is infinite."""
    seen = ops.visible(mask, queries, mask.shape[1], causal=False, window=0, chunk=chunk, device=mask.device)
    assert seen is not None
    if bias is not None and bias.dtype == torch.bool:
        seen, bias = seen & bias, None
    none = torch.scalar_tensor(0.0, dtype=dtype, device=mask.device)
    low = torch.scalar_tensor(torch.finfo(dtype).min / 2, dtype=dtype, device=mask.device)
    added = torch.where(seen, none, low)
    if bias is not None:
        added = added + bias.to(dtype)
    return added.expand(mask.shape[0], added.shape[1], queries, mask.shape[1])


def _attentions(part: fx.Graph) -> list[fx.Node]:
    return [node for node in part.nodes if node.target is torch.ops.surgeon.attention.default]


def _unfit(graph: Graph, node: fx.Node) -> str:
    """Why the operator does not compute an attention, or ""."""
    q, k, v = (val(argument) for argument in node.args[:3])
    options = node.kwargs
    if options.get("role", "self") != "self":
        return "it is a cross-attention"
    if options.get("prefix") or _has_columns(node):
        return "virtual tokens are constants of the graph, and the operator's cache has no place for them"
    if not options.get("causal"):
        return "it is not causal by itself"
    if options.get("group"):
        return "it is grouped"
    if not has_argument(node, 3):
        return "it has no mask"
    if q.shape[-1] != v.shape[-1]:
        return f"its keys have {q.shape[-1]} and its values {v.shape[-1]} channels"
    if q.shape[-1] % MULTIPLE:
        return f"heads of {q.shape[-1]} channels are no multiple of {MULTIPLE}"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} heads share {k.shape[1]} keys"
    return "" if _past(node, 1) and _past(node, 2) else "it reads keys of another attention, or keys that are changed"


def _has_columns(node: fx.Node) -> bool:
    """Whether something stands before the past."""
    whole: Any = node.args[1]
    inner = whole.args[0][-1] if whole.target is aten.cat.default else whole
    return inner is not whole and inner.target is aten.cat.default and inner.args[0][0].op == "placeholder"


def _past(node: fx.Node, position: int) -> tuple[Any, Any] | None:
    """Earlier and new keys or values, if the attention is all that reads them."""
    whole: Any = node.args[position]
    if whole.target is not aten.cat.default or len(whole.args[0]) != 2:
        return None
    past, new = whole.args[0]
    alone = past.op == "placeholder" and len(past.users) == 1
    return (past, new) if alone and all(user is node or user.op == "output" for user in whole.users) else None


def _replace(part: fx.Graph, node: fx.Node) -> None:
    keys, values = _past(node, 1), _past(node, 2)
    assert keys is not None
    assert values is not None
    with part.inserting_before(node):
        args = (node.args[0], keys[1], values[1], keys[0], values[0], *node.args[3:])
        q, k = (int(val(given).shape[1]) for given in node.args[:2])
        made = part.call_function(attention, args, {**node.kwargs, "heads": q, "shared": k})
        made.meta = dict(node.meta)
        pieces = [part.call_function(operator.getitem, (made, position)) for position in range(3)]
    for old, piece in zip((node, node.args[1], node.args[2]), pieces, strict=True):
        assert isinstance(old, fx.Node)
        piece.meta = dict(old.meta)
        old.replace_all_uses_with(piece, delete_user_cb=lambda user: user is not node)
    part.erase_node(node)


def _measure_by_mask(trunk: fx.Graph) -> None:
    """The number of earlier tokens, in a graph of torch sizes: that of all, which the mask has, less the new ones."""
    inputs = {str(node.target): node for node in inputs_of(trunk)}
    asked = [
        node for node in trunk.nodes if node.target is aten.sym_size.int and "past_key_values" in str(node.args[0])
    ]  # fmt: skip
    for node in asked:
        with trunk.inserting_before(node):
            total = trunk.call_function(aten.sym_size.int, (inputs["attention_mask"], 1))
            new = trunk.call_function(aten.sym_size.int, (inputs["input_ids"], 1))
            past = trunk.call_function(operator.sub, (total, new))
        for made in (total, new, past):
            made.meta = dict(node.meta)
        node.replace_all_uses_with(past)
        trunk.erase_node(node)
