"""Virtual tokens: learned rows before the tokens of an embedding, and everything in the trunk that counts tokens.

A trunk has three parts. Before the embedding, ids are as the user gave them. From there to the last layer the sequence
is longer: lengths, masks, positions and token types have the virtual tokens in front. After the last layer it is the
user's again, so that heads, poolers and losses see the tokens they were made for (and compute nothing for the others).
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon import lengths, numbering, positions
from surgeon.edit import Edit
from surgeon.errors import UnsupportedError
from surgeon.graph import MODEL_DTYPE, Graph, path_of, tag
from surgeon.run import owners
from surgeon.sites import EMBEDDING, Site, sites
from surgeon.strip import without
from surgeon.wiring import inputs_of

aten = torch.ops.aten
IDS = ("input_ids", "decoder_input_ids")
_MASK, _POSITIONS, _TYPES = "attention_mask", "position_ids", "token_type_ids"
_END = 2**63 - 1


@dataclass(frozen=True)
class Parts:
    """Where the sequence of one embedding is longer.

    Attributes:
        ids: the input with its token ids.
        before: what is computed from the ids on the way to the embedding.
        inside: what sees the virtual tokens.
    """

    ids: fx.Node
    before: frozenset[fx.Node]
    inside: frozenset[fx.Node]


def count(graph: Graph, name: str = "input_ids") -> int:
    """How many virtual tokens stand before the tokens of one input of the model."""
    return sum(step.virtual_tokens(graph).get(name, 0) for step in graph.applied)


def afterwards(graph: Graph) -> Graph:
    """The graph for tokens that follow the first ones: their virtual tokens are in the K/V cache by then."""
    gone = {owner for owner, step in owners(graph.applied).items() if step.virtual_tokens(graph)}
    return without(graph, gone) if gone else graph


def in_front(mask: torch.Tensor, count: int, value: int = 1) -> torch.Tensor:
    """A mask or labels `[b, t]` with `count` times the same value before them."""
    return torch.nn.functional.pad(mask, (count, 0), value=value) if count else mask


def moved(
    graph: Graph, labels: torch.Tensor | None, spans: dict[str, torch.Tensor]
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """Labels `[b, t]` and positions of answers for outputs that begin with virtual tokens (no label: -100)."""
    leading = sum(step.virtual_outputs(graph) for step in graph.applied)
    if labels is not None and graph.task in ("causal-lm", "seq2seq-lm", "token-classification"):
        labels = in_front(labels, leading, -100)
    return labels, {name: position + leading for name, position in spans.items()}


def token_embedding(graph: Graph, name: str) -> Site | None:
    """The embedding of the tokens in one input of the model, or None if the trunk looks none up."""
    nodes = {node.name: node for node in graph.trunk.nodes}
    for site in sites(graph, EMBEDDING):
        if site.layer == "" and any(n.op == "placeholder" and n.target == name for n in _way(nodes[site.node])):
            return site
    return None


def prepend(edit: Edit, rows: fx.Node, count: int, *, whole: bool = False) -> None:
    """Put rows before the tokens of the embedding that is being edited.

    Args:
        edit: at the embedding.
        rows: `[count, h]`.
        count: how many.
        whole: leave the outputs their virtual positions; they are cut off otherwise.

    Raises:
        UnsupportedError: something besides the embedding is looked up for every token.
    """
    graph, owner = edit.graph, edit.owner
    parts = _parts(graph, edit.node, whole)
    _check_lookups(graph, parts)
    cuts = _cuts(graph, parts)
    _embed(edit, rows)
    last = parts.ids.meta["val"].dim() - 1
    for size in list(parts.ids.users):
        if size.target is aten.sym_size.int and size.args[1] == last:
            longer = Edit.of_input(graph, owner, size)
            total = longer.call(operator.add, size, count)
            total.meta[positions.SHIFT] = count
            longer.replace(total, keep=_others(size, parts))
    for node in inputs_of(graph.trunk):
        if str(node.target).startswith("decoder_") == str(parts.ids.target).startswith("decoder_"):
            _lead(Edit.of_input(graph, owner, node), node, count, parts)
    for value, axis in cuts:
        cut = Edit.of_trunk(graph, owner, value)
        kept = [user for user in cut.y.users if user in parts.inside]
        cut.replace(cut.call(aten.slice.Tensor, cut.y, axis, count, _END), keep=kept)


def _parts(graph: Graph, embedding: fx.Node, whole: bool) -> Parts:
    way = _way(embedding)
    ids = next(node for node in way if node.op == "placeholder")
    before = {node for node in way if node is not embedding}
    calls = [node for node in graph.trunk.nodes if node.op == "call_module"]
    inside = _above(calls) | {user for call in calls for user in call.users}
    if not calls or (whole and not _reads_ids(graph, inside, before)):
        inside = {node for node in graph.trunk.nodes if node.op != "output" or whole}
    return Parts(ids, frozenset(before), frozenset(inside - before))


def _above(roots: list[fx.Node], known: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The roots and everything they are computed from, but for what is known and what that is computed from."""
    found, queue = set(roots), list(roots)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in found and node not in known:
                found.add(node)
                queue.append(node)
    return found


def _way(embedding: fx.Node) -> list[fx.Node]:
    """The embedding and the tensors between it and the input it looks up."""
    way, node = [embedding], embedding.args[1]
    while isinstance(node, fx.Node):
        way.append(node)
        tensors = [n for n in node.all_input_nodes if not isinstance(n.meta["val"], torch.SymInt)]
        node = tensors[0] if len(tensors) == 1 else None
    return way


def _reads_ids(graph: Graph, inside: set[fx.Node], before: set[fx.Node]) -> bool:
    """Whether what follows the layers reads token ids: a classifier that looks for the last token."""
    return any(_is_ids(source) for node in graph.trunk.nodes if node not in inside for source in node.all_input_nodes)


def _is_ids(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.target in IDS


def _check_lookups(graph: Graph, parts: Parts) -> None:
    for node in sorted(parts.before):
        for user in node.users:
            if user in parts.inside and isinstance(user.meta["val"], torch.Tensor) and not _is_site(user, parts):
                raise UnsupportedError(
                    f"virtual tokens have no ids, and {graph.config.model_type} also reads ids elsewhere",
                    f"{path_of(user) or 'the model'} ({user.target})",
                    "the low-rank methods and prefix work on this architecture",
                )


def _is_site(node: fx.Node, parts: Parts) -> bool:
    """Whether a reader of the ids is the embedding, or what an adapter of the embedding wrote there."""
    mark = tag(node)
    return mark is not None or (node.target is aten.embedding.default and node.args[1] in parts.before)


def _cuts(graph: Graph, parts: Parts) -> list[tuple[fx.Node, int]]:
    """What leaves the longer part with its virtual tokens, and along which axis they are."""
    length = lengths.symbol(parts.ids.meta["val"].shape[-1])
    leaving = [node for node in parts.inside if any(u not in parts.inside | parts.before for u in node.users)]
    leaving = [node for node in sorted(leaving) if node.op == "call_function"]
    return [(node, axis) for node in leaving for axis in lengths.axes(node, length)]


def _others(node: fx.Node, parts: Parts) -> list[fx.Node]:
    return [user for user in node.users if user not in parts.inside]


def _embed(edit: Edit, rows: fx.Node) -> None:
    """[rows; embedded tokens], after the embedding module's own scale and after adapters of it."""
    same = [
        n for n in edit.part.nodes if tag(n) is None and n.op == "call_function" and path_of(n) == path_of(edit.node)
    ]
    last = max((n for n in same if edit.node in _above([n])), default=edit.node)
    whole = Edit.of_trunk(edit.graph, edit.owner, last)
    batch = whole.call(aten.sym_size.int, whole.y, 0)
    repeated = whole.call(aten.expand.default, rows, [batch, -1, -1])
    whole.replace(whole.call(aten.cat.default, [repeated, whole.y], 1), outer=True)


def returned(trunk: fx.Graph, embedding: fx.Node) -> fx.Node:
    """What the module of an embedding returns: the embedding, or what the module itself makes of it (a scale)."""
    own = [n for n in trunk.nodes if tag(n) is None and n.op == "call_function" and path_of(n) == path_of(embedding)]
    return max(node for node in own if embedding in _above([node]))


def _lead(edit: Edit, node: fx.Node, count: int, parts: Parts) -> None:
    """What virtual tokens have in front of an input that is as long as the ids: seen, numbered from 0, of type 0."""
    kind, keep = str(node.target).removeprefix("decoder_"), _others(node, parts)
    if kind not in (_MASK, _POSITIONS, _TYPES):
        return
    last = node.meta["val"].dim() - 1
    sizes = [edit.call(aten.sym_size.int, node, axis) for axis in range(last)]
    fill = aten.new_zeros.default if kind == _TYPES else aten.new_ones.default
    front, rest = edit.call(fill, node, [*sizes, count]), node
    if kind == _POSITIONS:
        first = numbering.first(edit.graph)
        front = edit.call(aten.add.Tensor, edit.call(aten.cumsum.default, front, last), first - 1)
        rest = edit.call(aten.add.Tensor, node, count)
        rest.meta[positions.SHIFT] = count
    edit.replace(edit.call(aten.cat.default, [front, rest], last), keep=keep)


def embedded(graph: Graph, site: Site, ids: torch.Tensor) -> torch.Tensor:
    """What an embedding's module returns for ids `[n]`: `[n, h]` in fp32, with the module's own scale."""
    node = next(node for node in graph.trunk.nodes if node.name == site.node)
    last, way = returned(graph.trunk, node), _way(node)
    known: dict[fx.Node, Any] = dict.fromkeys(way[1:], ids)
    for step in sorted(_above([last], set(known)) - set(known)):
        if step.op == "get_attr":
            known[step] = _value(graph, str(step.target))
        elif step.op == "call_function":
            args, kwargs = fx.node.map_arg((step.args, dict(step.kwargs)), known.__getitem__)
            known[step] = step.target(*args, **kwargs)
    found: torch.Tensor = known[last]
    return found


def _value(graph: Graph, name: str) -> Any:
    if name == MODEL_DTYPE:
        return torch.float32
    full = graph.resolve(name)
    tensor = graph.inserted[full]() if full in graph.inserted else graph.values[full]
    return tensor.float() if tensor.is_floating_point() else tensor
