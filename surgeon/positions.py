"""Where a graph numbers its tokens, how far it can count, and how to make it start later."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from surgeon import context, lengths, numbering
from surgeon.edit import Edit
from surgeon.errors import UsageError
from surgeon.graph import Graph, copied, val
from surgeon.sites import Site

aten = torch.ops.aten
INPUT = "position_ids"
SHIFT = "shift"  # node.meta key: by how much later a node makes the tokens start
ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_SAME = (aten.view.default, aten.expand.default, aten.unsqueeze.default, aten.to.dtype, aten.slice.Tensor)


def shift(graph: Graph, owner: str, count: int | Callable[[Edit], fx.Node]) -> None:
    """Tokens that were numbered from 0 are numbered from `count`: given positions, and those the graph counts itself.

    An encoder's tokens keep their numbers where there is a decoder. A `count` that is known when the model runs is a
    function that writes its node.
    """
    for node in [n for n in graph.trunk.nodes if n.op == "placeholder" and n.target == INPUT]:
        _move(Edit.of_trunk(graph, owner, node), count)
    length = lengths.length_of(graph)
    for node in lengths.positions(graph.trunk, length):
        _move(Edit.of_trunk(graph, owner, node), count)
    for shared, paths in graph.groups():
        if not lengths.positions(shared, length):
            continue
        part = copied(shared)[0]
        for node in lengths.positions(part, length):
            _move(Edit(graph, part, paths, owner, Site("", "", paths[0], node.name), 0), count)
        graph.layers.update(dict.fromkeys(paths, part))


def _move(edit: Edit, count: int | Callable[[Edit], fx.Node]) -> None:
    amount = count if isinstance(count, int) else count(edit)
    if isinstance(amount, fx.Node):
        edit.write_after(max(edit.y, amount))
    moved = edit.call(aten.add.Tensor, edit.y, amount)
    moved.meta[SHIFT] = count if isinstance(count, int) else 0
    edit.replace(moved)


def limit(graph: Graph) -> int:
    """How many tokens the model has positions for, 0 for no limit: rows of its table, or what its config says."""
    rooms = [room for _, room in _tables(graph)]
    if rooms:
        return min(rooms) - numbering.first(graph)
    return context.limit(graph.config)


def check(graph: Graph, tokens: int, given: torch.Tensor | None) -> None:
    """Raise UsageError for a text, or positions of the user's, beyond what the model has, or moved ones leave of it.

    Args:
        graph: the model.
        tokens: number of tokens of the text.
        given: `[b, t]`, positions the user chose; None if they are counted.
    """
    found = room(graph)
    if found is not None and given is not None:
        require(found, int(given.max()), f"{INPUT}, for {tokens} tokens")
    elif found is not None:
        require(found, tokens - 1 + numbering.first(graph), f"a text of {tokens} tokens")


def room(graph: Graph) -> tuple[int, int] | None:
    """The first position of the text that a table has no row for, after how many positions it is moved by."""
    return min(_tables(graph), key=lambda pair: pair[1], default=None)


def require(found: tuple[int, int], last: int, where: str) -> None:
    """Raise UsageError if a `room` has no row for the last position."""
    moved, rows = found
    if last >= rows and moved:
        what = f"position {last} is beyond the {rows} that {moved} virtual tokens leave"
        raise UsageError(what, where, "a shorter text, or fewer --tokens")
    if last >= rows:
        raise UsageError(f"position {last} is beyond the {rows} that the model has", where, "a shorter text")


def _tables(graph: Graph) -> Iterator[tuple[int, int]]:
    """(shift, room) of every table of positions: how far passes move them, and the first position it has no row for."""
    length = lengths.length_of(graph)
    inputs = [n for n in graph.trunk.nodes if n.op == "placeholder" and n.target == INPUT]
    for start in [*inputs, *lengths.positions(graph.trunk, length)]:
        counted = sum(source.meta.get(SHIFT, 0) for source in start.all_input_nodes)
        yield from _below(start, counted, counted)


def check_source(graph: Graph, tokens: int) -> None:
    """Raise UsageError for a text of an encoder beyond its table, or beyond what virtual tokens leave of it."""
    ids = next((n for n in graph.trunk.nodes if n.op == "placeholder" and n.target == "input_ids"), None)
    own = [] if ids is None else lengths.positions(graph.trunk, lengths.symbol(val(ids).shape[-1]))
    counts = [n for n in graph.trunk.nodes if n.op == "call_function" and n.target in ARANGES]
    for node in counts:
        shift = sum(source.meta.get(SHIFT, 0) for source in node.all_input_nodes)
        for found in _below(node, shift, shift) if shift or node in own else ():
            require(found, tokens - 1, f"a text of {tokens} tokens")


def _below(node: fx.Node, shift: int, offset: int) -> Iterator[tuple[int, int]]:
    for user in node.users:
        if user.target is aten.embedding.default and user.args[1] is node:
            yield shift, int(user.args[0].meta["val"].shape[0]) - offset
        elif user.target is aten.add.Tensor and isinstance(user.args[1], int):
            yield from _below(user, shift + user.meta.get(SHIFT, 0), offset + user.args[1])
        elif user.target in _SAME or user.target is aten.cat.default:
            yield from _below(user, shift, offset)
