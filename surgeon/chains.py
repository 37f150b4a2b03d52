"""Layers of a trunk that call one another in turn, found so that they can be shown as one."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Chain:
    """Two or more consecutive layers; each reads at the same places what the one before it returned.

    Attributes:
        calls: the calls, in order.
        carried: position of an argument → which output of the layer before it is.
        results: the outputs of the last layer that are read, in order.
        nodes: every node that stands for the chain: calls and the reads of their outputs.
    """

    calls: tuple[fx.Node, ...]
    carried: dict[int, int]
    results: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]

    @property
    def paths(self) -> list[str]:
        """The layers."""
        return [str(call.target) for call in self.calls]

    @property
    def stem(self) -> str:
        """The path of the list the layers are in."""
        return self.paths[0].rpartition(".")[0]

    def groups(self) -> list[tuple[fx.Node, list[str]]]:
        """Layers called alike but for what is carried: the first call of each kind, and the layers of the kind."""
        alike: dict[tuple[object, ...], tuple[fx.Node, list[str]]] = {}
        for call in self.calls:
            key = tuple(None if position in self.carried else arg for position, arg in enumerate(call.args))
            alike.setdefault(key, (call, []))[1].append(str(call.target))
        return list(alike.values())


def chains(part: fx.Graph) -> list[Chain]:
    """The longest chains of a trunk, in order; none in a layer."""
    found: list[Chain] = []
    run: list[fx.Node] = []
    carried: dict[int, int] = {}
    for node in part.nodes:
        if node.op != "call_module":
            continue
        links = _links(run[-1], node) if run and _is_next(run[-1], node) else {}
        if links and (links == carried if len(run) > 1 else _starts(run[0], node, links)):
            run.append(node)
            carried = links
            continue
        found += _made(run, carried)
        run, carried = [node], {}
    return found + list(_made(run, carried))


def _made(run: list[fx.Node], carried: dict[int, int]) -> Iterator[Chain]:
    if len(run) > 1:
        reads = [node for call in run for node in _reads(call)]
        results = sorted(_reads(run[-1]), key=lambda read: int(str(read.args[1])))
        yield Chain(tuple(run), carried, tuple(results), frozenset([*run, *reads]))


def _reads(call: fx.Node) -> list[fx.Node]:
    return [user for user in call.users if user.target is operator.getitem]


def _links(before: fx.Node, call: fx.Node) -> dict[int, int]:
    """What `call` reads of `before`; nothing if anything else reads it, or a node between must be shown."""
    reads = {read: int(str(read.args[1])) for read in _reads(before)}
    if set(before.users) != set(reads) or any(set(read.users) != {call} for read in reads):
        return {}
    node = before.next
    while node is not call:
        if node not in reads and node.op != "get_attr":
            return {}
        node = node.next
    return {position: reads[arg] for position, arg in enumerate(call.args) if isinstance(arg, fx.Node) and arg in reads}


def _starts(first: fx.Node, call: fx.Node, links: dict[int, int]) -> bool:
    """Whether the first layer gets from elsewhere what later ones are handed, at the same places."""
    return all(
        position < len(first.args) and _shape(first.args[position]) == _shape(call.args[position]) for position in links
    )


def _shape(value: object) -> list[object]:
    shape = value.meta["val"].shape if isinstance(value, fx.Node) and hasattr(value.meta["val"], "shape") else ()
    return [size if isinstance(size, int) else None for size in shape]


def _is_next(before: fx.Node, call: fx.Node) -> bool:
    (stem, _, number), (other, _, following) = str(before.target).rpartition("."), str(call.target).rpartition(".")
    return stem == other and number.isdigit() and following.isdigit() and int(following) == int(number) + 1


def span(paths: Iterable[str]) -> str:
    """Layer paths in short: `model.layers.{0-4,6}`."""
    shown: list[str] = []
    lists: dict[str, list[int]] = {}
    for path in paths:
        stem, _, number = path.rpartition(".")
        if not number.isdigit():
            shown.append(path)
        else:
            lists.setdefault(stem, []).append(int(number))
    for stem, numbers in lists.items():
        ranges = [f"{a}-{b}" if a != b else f"{a}" for a, b in _ranges(numbers)]
        text = ",".join(ranges)
        shown.append(f"{stem}.{text}" if text.isdigit() else f"{stem}.{{{text}}}")
    return ", ".join(shown)


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    start = numbers[0]
    for number, following in zip(numbers, [*numbers[1:], None], strict=True):
        if following != number + 1:
            yield start, number
            start = following if following is not None else start
