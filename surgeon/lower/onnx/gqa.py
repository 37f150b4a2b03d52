"""Causal attention with its K/V cache as com.microsoft.GroupQueryAttention, which owns the cache.

The operator reads the new keys and values and those of earlier tokens, and returns the attention and all of them: the
runtime may keep both in one buffer (`past_present_share_buffer`), so nothing may ask how long the past's tensor is; the
length is that of the attention mask. Padding, on either side, goes in as a sum on the scores: what the operator knows
of lengths alone (`seqlens_k`) would be wrong for a batch padded on the left. Rotary embeddings are its own, or
com.microsoft.RotaryEmbedding, or as the model writes them: see `surgeon.lower.onnx.rotary` and `angles`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon import positions
from surgeon.graph import MODEL_DTYPE, Graph, copied, sweep, val
from surgeon.lower.onnx import group_query, rotary
from surgeon.lower.onnx.angles import Angles
from surgeon.lower.onnx.handed import Handed
from surgeon.lower.onnx.rows import give_rows, in_rows, is_written
from surgeon.sites import has_argument
from surgeon.wiring import calls_of, inputs_of, prune

aten = torch.ops.aten
MULTIPLE = 8
"""What the size of a head has to be a multiple of, and the number of angles that the operator turns it by."""
OWN, NODE, WRITTEN = "GroupQueryAttention", "RotaryEmbedding", "none found"


@dataclass(frozen=True)
class Fused:
    """A graph whose attentions are the operator, or the graph as it was.

    Attributes:
        graph: the graph.
        reasons: why it is as it was: reason → paths of the layers.
        rotary: what computes rotary embeddings, if there are any: operator → paths of the layers.
    """

    graph: Graph
    reasons: Mapping[str, Sequence[str]]
    rotary: Mapping[str, Sequence[str]]

    @property
    def fused(self) -> bool:
        """Whether the attentions are the operator."""
        return not self.reasons


def fuse(graph: Graph, *, preloaded: bool = False) -> Fused:
    """Put the operator in the place of every attention of a graph with a K/V cache, or of none.

    Runtimes that keep past and present in one buffer need all attentions to do so. A cache may be `preloaded` with keys
    that no angle has turned (a prefix): tokens are then turned by their positions, and not by their places in the row.
    """
    reasons: dict[str, list[str]] = {}
    for part, paths in [(graph.trunk, ["the trunk"]), *graph.groups()]:
        for node in attentions(part):
            why = "it is in no layer" if part is graph.trunk else _unfit(graph, node, paths)
            if why:
                reasons.setdefault(why, []).extend(paths)
    if not any(attentions(part) for part, _ in graph.groups()):
        reasons["the model has no attention that surgeon knows"] = ["the model"]
    if reasons:
        return Fused(graph, reasons, {})
    fusion = _Fusion(graph, preloaded=preloaded)
    for shared, paths in graph.groups():
        part, _ = copied(shared)
        for node in attentions(part):
            fusion.replace(part, paths, node)
        sweep(part)
        fusion.made.layers.update(dict.fromkeys(paths, part))
    _measure_by_mask(fusion.trunk)
    prune(fusion.made)
    return Fused(fusion.made, {}, fusion.rotary)


class _Fusion(Handed):
    """Replaces the attentions of a copy of a graph; what all layers need is computed once, in the trunk."""

    def __init__(self, graph: Graph, *, preloaded: bool) -> None:
        super().__init__(graph)
        self.angles = Angles(graph, self.trunk, 0 if preloaded else positions.limit(graph))
        self.rotary: dict[str, list[str]] = {}
        self._added: dict[tuple[fx.Node, int], fx.Node] = {}
        mask, last = self.inputs["attention_mask"], inputs_of(self.trunk)[-1]
        with self.trunk.inserting_before(last.next):
            self.total = self.trunk.call_function(group_query.total, (mask,))
            self.lengths = self.trunk.call_function(group_query.lengths, (mask, self.total))

    def replace(self, part: fx.Graph, paths: list[str], node: fx.Node) -> None:
        """The operator in the place of one attention."""
        keys, values = past_of(node, 1), past_of(node, 2)
        assert keys is not None
        assert values is not None
        given: list[Any] = [*node.args[3:], None, None]
        mask, bias, sinks = given[:3]
        options: dict[str, Any] = {k: node.kwargs[k] for k in ("scale", "window", "softcap") if k in node.kwargs}
        options["heads"] = int(val(node.args[0]).shape[1])
        chunk = int(str(node.kwargs.get("chunk", 0)))
        added = self.hand(part, paths, mask, f"added_{chunk}", lambda known: self._sum(known, chunk))
        lengths = self.hand(part, paths, mask, "lengths", lambda _: self.lengths)
        total = self.hand(part, paths, mask, "total", lambda _: self.total)
        rows, angles, more = self._turned(part, paths, node, (node.args[0], keys[1], values[1]))
        with part.inserting_before(node):
            added = added if bias is None else part.call_function(group_query.biased, (added, bias))
            args = (*rows, keys[0], values[0], lengths, total, added, *angles, sinks)
            made = part.call_function(group_query.attention, args, options | more)
            pieces = [part.call_function(operator.getitem, (made, position)) for position in range(3)]
        for old, piece in zip((node.args[1], node.args[2]), pieces[1:], strict=True):
            assert isinstance(old, fx.Node)
            piece.meta = dict(old.meta)
            old.replace_all_uses_with(piece, delete_user_cb=lambda user: user is not node)
        give_rows(node, pieces[0])
        part.erase_node(node)

    def _turned(
        self, part: fx.Graph, paths: list[str], node: fx.Node, given: tuple[Any, Any, Any]
    ) -> tuple[list[fx.Node], tuple[Any, Any], dict[str, Any]]:
        """Rows of queries, keys and values, tables of angles for the operator itself, and options."""
        q, k, v = given
        found, other = rotary.find(q), rotary.find(k)
        same = found is not None and other is not None and found.like(other)
        how = self._how(part, paths, found, int(val(q).shape[3])) if found is not None and same else WRITTEN
        self.rotary.setdefault(how, []).extend(paths)
        if found is None or other is None or how == WRITTEN:
            return [in_rows(x) for x in given], (None, None), {}
        rows, tables, make = [in_rows(x) for x in (found.x, other.x, v)], (found.cos, found.sin), found.table
        if how == OWN:
            cos, sin = (self.hand(part, paths, t, "table", lambda one: self.angles.table(one, make)) for t in tables)
            return rows, (cos, sin), {"pairs": found.pairs}
        cos, sin = (self.hand(part, paths, t, "angles", lambda one: self.angles.current(one, make)) for t in tables)
        places = self.hand(part, paths, found.cos, "places", self.angles.places)
        with part.inserting_before(node):
            for position, x in enumerate((q, k)):
                options = {"heads": int(val(x).shape[1]), "pairs": found.pairs}
                turned = part.call_function(group_query.rotated, (rows[position], places, cos, sin), options)
                rows[position] = turned
        return rows, (None, None), {}

    def _how(self, part: fx.Graph, paths: list[str], found: rotary.Rotation, size: int) -> str:
        """What computes a rotation in all of the layers."""
        pairs = {(self.given(part, path, found.cos), self.given(part, path, found.sin)) for path in paths}
        if not all(self.angles.has(node, found.table) for pair in pairs for node in pair):
            return WRITTEN
        fits = found.channels % (2 * MULTIPLE) == 0 == size % (2 * MULTIPLE)
        return OWN if fits and all(self.angles.relative(*pair, found.table) for pair in pairs) else NODE

    def _sum(self, mask: fx.Node, chunk: int) -> fx.Node:
        """What hides padding, of a mask of the trunk."""
        if (mask, chunk) not in self._added:
            with self.trunk.inserting_before(mask.next):
                args = (mask, self.inputs["input_ids"], self.trunk.get_attr(MODEL_DTYPE), chunk)
                self._added[mask, chunk] = self.trunk.call_function(group_query.added, args)
        return self._added[mask, chunk]


def attentions(part: fx.Graph) -> list[fx.Node]:
    """Those nodes of a part."""
    return [node for node in part.nodes if node.target is torch.ops.surgeon.attention.default]


def _unfit(graph: Graph, node: fx.Node, paths: Sequence[str]) -> str:
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
    if not has_argument(node, 3) or node.args[3].op != "placeholder":
        return "it has no mask that all layers share"
    if any(len(calls_of(graph.trunk, path)) > 1 for path in paths):
        return "its layer is called more than once"
    if q.shape[-1] != v.shape[-1]:
        return f"its keys have {q.shape[-1]} and its values {v.shape[-1]} channels"
    if q.shape[-1] % MULTIPLE:
        return f"heads of {q.shape[-1]} channels are no multiple of {MULTIPLE}"
    if q.shape[1] % k.shape[1]:
        return f"{q.shape[1]} heads share {k.shape[1]} keys"
    return (
        "" if past_of(node, 1) and past_of(node, 2) else "it reads keys of another attention, or keys that are changed"
    )


def _has_columns(node: fx.Node) -> bool:
    """Whether something stands before the past."""
    whole: Any = node.args[1]
    inner = whole.args[0][-1] if whole.target is aten.cat.default else whole
    return inner is not whole and inner.target is aten.cat.default and inner.args[0][0].op == "placeholder"


def past_of(node: fx.Node, position: int) -> tuple[Any, Any] | None:
    """Earlier and new keys or values, if the attention is all that reads them."""
    whole: Any = node.args[position]
    if whole.target is not aten.cat.default or len(whole.args[0]) != 2:
        return None
    past, new = whole.args[0]
    alone = past.op == "placeholder" and len(past.users) == 1 and not is_written(new)
    return (past, new) if alone and all(user is node or user.op == "output" for user in whole.users) else None


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
