"""Position biases of attentions (T5, ALiBi), computed as if there were tokens before the first."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from surgeon import lengths
from surgeon.edit import Edit
from surgeon.graph import Graph, tag
from surgeon.sites import Site, argument_of, has_argument

aten = torch.ops.aten


def widen(edit: Edit, count: int | fx.Node) -> None:
    """The bias of the attention that is being edited, for `count` keys more, which come first.

    A bias that this graph is given is widened where it is computed.
    """
    root = edit.argument(4)
    mark = tag(root)
    if root.op == "placeholder" or (mark is not None and mark.owner == edit.owner):
        return
    there = Edit(edit.graph, edit.part, edit.paths, edit.owner, Site("", "", edit.site.layer, root.name), 0)
    there.replace(_widened(there, root, count))


def sees_text(bias: fx.Node) -> bool:
    """Whether a bias is computed from the text itself (DeBERTa): tokens that have none have no bias either."""
    return any(node.target is aten.linear.default for node in lengths.ancestors([bias]))


def is_alibi(bias: fx.Node) -> bool:
    """Whether a bias is one for all queries: it grows along the keys, and a key that counts as none has no place."""
    value = bias.meta["val"]
    return bool(value.is_floating_point()) and value.shape[-2] == 1 and value.shape[-1] != 1


def widen_trunk(
    graph: Graph, owner: str, count: int | fx.Node, *, every: bool, layers: Collection[str] | None = None
) -> None:
    """The biases that the trunk computes for its layers, or for some: every one, or those that are ALiBi."""
    chosen = graph.layers if layers is None else layers
    for call in [node for node in graph.trunk.nodes if node.op == "call_module" and node.target in chosen]:
        layer = graph.layers[str(call.target)]
        attentions = [node for node in lengths.attentions(layer) if node.kwargs.get("role") != "cross"]
        biases = {argument_of(node, 4) for node in attentions if has_argument(node, 4)}
        for inner, given in lengths.fed(layer, call):
            mark = tag(given)
            wanted = inner in biases and (every or is_alibi(inner))
            if wanted and not lengths.comes_from_layer(given) and (mark is None or mark.owner != owner):
                edit = Edit.of_trunk(graph, owner, given)
                edit.replace(_widened(edit, given, count))


def _widened(edit: Edit, root: fx.Node, count: int | fx.Node) -> fx.Node:
    """A bias `[.., t | 1, s]` computed for `count` more, its last rows."""
    length = _length(root)
    copies: dict[fx.Node, fx.Node] = {}
    longer: dict[fx.Node, fx.Node] = {}
    edit.write_after(root)
    for node in lengths.ancestors([root]):
        if node.op == "placeholder" and str(node.target).endswith("attention_mask"):
            copies[node] = _more_seen(edit, node, count)  # ALiBi counts the tokens of the mask
            continue
        for size in node.all_input_nodes:
            if lengths.is_sized(size, length) and size not in longer:
                longer[size] = _more(edit, size, length, count)
        if any(source in copies or source in longer for source in node.all_input_nodes):
            copies[node] = edit.copy(node, {**copies, **longer})
    result: Any = copies.get(root, root)
    rows = [lengths.symbol(node.meta["val"].shape[-2]) for node in (root, result)]
    return result if rows[0] == rows[1] else edit.call(aten.slice.Tensor, result, -2, count, 2**63 - 1)


def _length(root: fx.Node) -> str:
    """The symbol of s, which a slice of a longer table has in a formula."""
    size = root.meta["val"].shape[-1]
    symbols = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else ()
    return str(next(iter(symbols))) if len(symbols) == 1 else lengths.symbol(size)


def _more(edit: Edit, size: fx.Node, length: str, count: int | fx.Node) -> fx.Node:
    """A number computed from s, computed from `count` more."""
    if lengths.is_length(size, length):
        return edit.call(operator.add, size, count)
    inputs = [n for n in size.all_input_nodes if lengths.is_sized(n, length)]
    return edit.copy(size, {n: _more(edit, n, length, count) for n in inputs})


def _more_seen(edit: Edit, mask: fx.Node, count: int | fx.Node) -> fx.Node:
    """A key mask with `count` tokens before the first."""
    rows = edit.call(aten.sym_size.int, mask, 0)
    return edit.call(aten.cat.default, [edit.call(aten.new_ones.default, mask, [rows, count]), mask], 1)
