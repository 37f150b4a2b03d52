"""Attentions as ONNX's own operator of opset 23, and rotary embeddings before them; see `surgeon.lower.onnx.opset_23`.

Every attention is decided by itself: where the operator does not compute it, that one stays in standard operators.
Where its cache is its own, the operator reads rows and the earlier keys and values and returns all of them; elsewhere
(encoders, cross-attention, prefixes before the past) it is given whole keys and values by heads.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.graph import MODEL_DTYPE, Graph, copied, sweep, val
from surgeon.lower.onnx import group_query, opset_23, rotary
from surgeon.lower.onnx.angles import IDS, Angles
from surgeon.lower.onnx.gqa import NODE, WRITTEN, attentions, past_of
from surgeon.lower.onnx.handed import Handed
from surgeon.lower.onnx.rows import give_rows, in_rows, is_written
from surgeon.wiring import calls_of, prune

aten = torch.ops.aten
PATTERN = ("causal", "window", "chunk", "prefix")
"""Options of an attention that say which keys a query sees, see `surgeon.ops.visible`."""


@dataclass(frozen=True)
class Found:
    """What became of a graph's attentions.

    Attributes:
        graph: with the operators.
        any: whether any attention is one.
        reasons: why others are not: reason → paths of the layers.
        rotary: what computes rotary embeddings, if there are any: operator → paths of the layers.
    """

    graph: Graph
    any: bool
    reasons: Mapping[str, Sequence[str]]
    rotary: Mapping[str, Sequence[str]]


def fuse(graph: Graph) -> Found:
    """Put the operators in the place of the attentions that they compute, and of the rotations before them."""
    fusion = _Fusion(graph)
    for node in attentions(fusion.trunk):
        fusion.replace(fusion.trunk, ["the trunk"], node)
    for shared, paths in graph.groups():
        if not attentions(shared):
            continue
        part, _ = copied(shared)
        for node in attentions(part):
            fusion.turn(part, paths, node)
            fusion.replace(part, paths, node)
        sweep(part)
        fusion.made.layers.update(dict.fromkeys(paths, part))
    prune(fusion.made)
    return Found(fusion.made, fusion.replaced, fusion.reasons, fusion.rotary)


class _Fusion(Handed):
    """Replaces the attentions of a copy of a graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.graph, self.angles = graph, Angles(graph, self.trunk, 0)
        self.replaced = False
        self.reasons: dict[str, list[str]] = {}
        self.rotary: dict[str, list[str]] = {}
        self._sums: dict[tuple[Any, ...], fx.Node] = {}

    def turn(self, part: fx.Graph, paths: Sequence[str], node: fx.Node) -> None:
        """RotaryEmbedding in the place of what turns an attention's queries and its new keys."""
        for x in (node.args[0], _newest(node.args[1])):
            found = rotary.find(x)
            if found is None or is_written(found.x):
                continue
            how = NODE if self._knows(part, paths, found) else WRITTEN
            self.rotary.setdefault(how, []).extend(path for path in paths if path not in self.rotary.get(how, ()))
            if how == NODE:
                self._turn(part, paths, x, found)

    def _turn(self, part: fx.Graph, paths: Sequence[str], x: fx.Node, found: rotary.Rotation) -> None:
        row, tables = in_rows(found.x), (found.cos, found.sin)
        make = found.table
        cos, sin = (
            self.hand(part, paths, t, "of_tokens", lambda one: self.angles.of_tokens(one, make)) for t in tables
        )
        _, heads, _, size = val(x).shape
        with part.inserting_before(x):
            made = part.call_function(opset_23.rotated, (row, cos, sin), {"heads": int(heads), "pairs": found.pairs})
            made.meta["val"] = val(row)
            split = part.call_function(aten.unflatten.int, (made, 2, [heads, size]))
            split.meta["val"] = val(row).unflatten(2, [heads, size])
            turned = part.call_function(aten.transpose.int, (split, 1, 2))
        turned.meta = dict(x.meta)
        x.replace_all_uses_with(turned)

    def _knows(self, part: fx.Graph, paths: Sequence[str], found: rotary.Rotation) -> bool:
        """Whether the trunk has the angles of a rotation, in all of the layers."""
        once = all(len(calls_of(self.trunk, path)) == 1 for path in paths)
        return once and all(
            self.angles.has(self.given(part, path, table), found.table)
            for path in paths
            for table in (found.cos, found.sin)
        )

    def replace(self, part: fx.Graph, paths: Sequence[str], node: fx.Node) -> None:
        """The operator in the place of one attention, or the reason why not."""
        if why := _unfit(node):
            self.reasons.setdefault(why, []).extend(paths)
            return
        self.replaced = True
        q, k, v, mask, bias = [*node.args, None, None][:5]
        pattern = {name: node.kwargs[name] for name in PATTERN if node.kwargs.get(name)}
        if self._is_shared(part, paths, node):
            label = "_".join(["added", *(f"{name}_{int(value)}" for name, value in pattern.items())])
            added = self.hand(part, paths, mask, label, lambda known: self._sum(known, pattern))
            if bias is not None:
                with part.inserting_before(node):
                    added = part.call_function(group_query.biased, (added, bias))
            mask, bias, pattern = None, added, {}
            if past_of(node, 1) and past_of(node, 2):
                self._cached(part, node, added)
                return
        node.target, node.args = opset_23.attention, (q, k, v, mask, bias)
        node.kwargs = {"scale": node.kwargs["scale"], **pattern}

    def _cached(self, part: fx.Graph, node: fx.Node, added: fx.Node) -> None:
        """With its cache; keys and values with their past are the operator's."""
        keys, values = past_of(node, 1), past_of(node, 2)
        assert keys is not None
        assert values is not None
        heads = int(val(node.args[0]).shape[1])
        rows = [in_rows(x) for x in (node.args[0], keys[1], values[1])]
        with part.inserting_before(node):
            args, options = (*rows, keys[0], values[0], added), {"heads": heads, "scale": node.kwargs["scale"]}
            made = part.call_function(opset_23.cached, args, options)
            pieces = [part.call_function(operator.getitem, (made, position)) for position in range(3)]
        for old, piece in zip((node.args[1], node.args[2]), pieces[1:], strict=True):
            assert isinstance(old, fx.Node)
            piece.meta = dict(old.meta)
            old.replace_all_uses_with(piece, delete_user_cb=lambda user: user is not node)
        give_rows(node, pieces[0])
        part.erase_node(node)

    def _is_shared(self, part: fx.Graph, paths: Sequence[str], node: fx.Node) -> bool:
        """Whether the trunk can make what is added to the scores: of its mask, for as many queries as it has ids."""
        mask: Any = [*node.args, None, None][3]
        if part is self.trunk or mask is None or mask.op != "placeholder" or IDS not in self.inputs:
            return False
        queries, keys = val(node.args[0]).shape[2], val(node.args[1]).shape[2]
        sizes = (val(self.inputs[IDS]).shape[-1], val(mask).shape[-1])
        once = all(len(calls_of(self.trunk, path)) == 1 for path in paths)
        return once and val(self.inputs[IDS]).dim() == 2 == val(mask).dim() and str(sizes) == str((queries, keys))

    def _sum(self, mask: fx.Node, pattern: dict[str, Any]) -> fx.Node:
        """What is added to the scores, of a mask of the trunk."""
        key = (mask, *(int(pattern.get(name, 0)) for name in PATTERN))
        if key not in self._sums:
            rules = [bool(pattern.get("causal")), *key[2:]]
            with self.trunk.inserting_before(mask.next):
                args = (mask, self.inputs[IDS], self.trunk.get_attr(MODEL_DTYPE), *rules)
                self._sums[key] = self.trunk.call_function(opset_23.added, args)
        return self._sums[key]


def _unfit(node: fx.Node) -> str:
    """Why the operator does not compute an attention, or ""."""
    bias, sinks = [*node.args, None, None, None][4:6]
    heads, shared = (int(val(x).shape[1]) for x in node.args[:2])
    if sinks is not None:
        return "it has sinks"
    if node.kwargs.get("group"):
        return "it is grouped"
    if node.kwargs.get("softcap"):
        # ONNX moved it before the mask within opset 23 (onnx#7867). Runtimes of before, ONNX Runtime 1.23 among them,
        # cap -infinity and the like too, so that queries see every key, without a word.
        return "runtimes differ in whether its softcap is before the mask"
    if isinstance(bias, fx.Node) and val(bias).dtype == torch.bool:
        return "its bias is boolean, and a token that sees no key would not give 0"
    return f"{heads} heads share {shared} keys" if heads % shared else ""


def _newest(whole: Any) -> fx.Node:
    """Of keys with their past, those of the new tokens."""
    found: fx.Node = whole.args[0][-1] if whole.target is aten.cat.default else whole
    return found
