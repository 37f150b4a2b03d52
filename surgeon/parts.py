"""Which outputs of a fused projection are queries, keys and values, found in the graph and not by a model's name.

What stands between the projection and the attention node (splits, transposes, norms, rotary) runs on random numbers;
an output that the gradient of the queries reaches is a query's, and so on. Every layout in use is a run of rows per
part, repeated: `[q | k | v]` (GPT-2, Phi-3), per head (GPT-NeoX, Bloom), per group of heads (Falcon).
"""

from __future__ import annotations

import itertools
import re
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.sites import Site, argument_of

aten = torch.ops.aten
PARTS = ("q", "k", "v")
NONE = "-"
_known: weakref.WeakKeyDictionary[fx.Graph, dict[str, Layout | str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Layout:
    """The outputs of a projection, in order: `repeats` times its runs of (part, rows).

    Written as `q32,k16,v16` or `4*q8,k8,v8`; a part of `-` is read by no attention.
    """

    repeats: int
    runs: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        times = f"{self.repeats}*" if self.repeats > 1 else ""
        return times + ",".join(f"{part}{rows}" for part, rows in self.runs)

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The other way; raises UsageError for what is none."""
        found = re.fullmatch(r"(?:(\d+)\*)?([qkv-]\d+(?:,[qkv-]\d+)*)", text)
        if found is None:
            raise UsageError(f"'{text}' is no layout of a projection", "layouts", "for example q32,k16,v16")
        runs = tuple((word[0], int(word[1:])) for word in found[2].split(","))
        return cls(int(found[1] or 1), runs)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that it has, in the order of q, k, v."""
        return tuple(part for part in PARTS if self.rows(part))

    def rows(self, part: str) -> int:
        """How many outputs belong to a part."""
        return self.repeats * sum(rows for name, rows in self.runs if name == part)


def layout_of(graph: Graph, site: Site) -> Layout:
    """Which outputs of a linear are queries, keys and values.

    Raises:
        UnsupportedError: no attention node reads it, or outputs belong to two parts at once.
    """
    part = graph.layers.get(site.layer, graph.trunk)
    known = _known.setdefault(part, {})
    if site.node not in known:
        known[site.node] = _layout(part, next(node for node in part.nodes if node.name == site.node))
    found = known[site.node]
    if isinstance(found, str):
        raise UnsupportedError(found, site.path, "leave the module out with --exclude, or adapt it whole")
    return found


def _layout(part: fx.Graph, y: fx.Node) -> Layout | str:
    after, attentions = _after(y)
    given = [(word, argument_of(one, position)) for one in attentions for position, word in enumerate(PARTS)]
    read = [(word, node) for word, node in given if node in after]
    if not read:
        return "no attention node reads it as queries, keys or values"
    values = _run([node for node in part.nodes if node in after], y)
    owner = [NONE] * int(y.meta["val"].shape[-1])
    for word, node in read:
        for row in _rows(values[y], values[node]):
            if owner[row] not in (NONE, word):
                return f"its output {row} belongs to {owner[row]} and to {word}"
            owner[row] = word
    return _periodic("".join(owner))


def _after(y: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
    """What is computed from a node before an attention, and the attentions it ends in."""
    found, pending, attentions = {y}, [y], dict[fx.Node, None]()
    while pending:
        for user in pending.pop().users:
            if user.target is torch.ops.surgeon.attention.default:
                attentions[user] = None
            elif user not in found and user.op == "call_function":
                found.add(user)
                pending.append(user)
    return found, list(attentions)


def _run(nodes: list[fx.Node], y: fx.Node) -> dict[fx.Node, Any]:
    """The nodes on random numbers in place of y and of every other float they read, at the sizes of the capture.

    Integers that the graph makes itself (indices of heads) are made.
    """
    generator = torch.Generator().manual_seed(0)
    values: dict[fx.Node, Any] = {y: _drawn(y.meta["val"], generator).requires_grad_()}

    def value(node: fx.Node) -> Any:
        if node not in values:
            made = node.op == "call_function" and not _is_float(node.meta.get("val"))
            values[node] = called(node) if made else _drawn(node.meta.get("val"), generator)
        return values[node]

    def called(node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
        return args[0] if node.target is aten.dropout.default else node.target(*args, **kwargs)

    with torch.enable_grad():
        for node in nodes:
            if node is not y:
                values[node] = called(node)
    return values


def _is_float(example: Any) -> bool:
    return isinstance(example, torch.Tensor) and example.dtype.is_floating_point


def _drawn(example: Any, generator: torch.Generator) -> Any:
    """A value like the example of the capture, on the CPU: numbers of N(1, 1) for floats, zeros for integers."""
    if isinstance(example, torch.Tensor):
        shape = [_size(size) for size in example.shape]
        if not _is_float(example):
            return torch.zeros(shape, dtype=example.dtype)
        return torch.randn(shape, generator=generator).add_(1).to(example.dtype)
    return torch.device("cpu") if isinstance(example, torch.device) else _size(example)


def _size(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _rows(y: torch.Tensor, part: torch.Tensor) -> list[int]:
    """The outputs, of the last axis of y, that a part is made of."""
    (slope,) = torch.autograd.grad(part.float().square().sum(), [y], retain_graph=True, allow_unused=True)
    if slope is None:
        return []
    return slope.flatten(0, -2).ne(0).any(0).nonzero()[:, 0].tolist()


def _periodic(owner: str) -> Layout:
    """The shortest run of parts whose repetition is this."""
    if len(set(owner)) == 1:
        return Layout(1, ((owner[0], len(owner)),))
    sizes = [n for n in range(2, len(owner) + 1) if len(owner) % n == 0 and owner[:n] * (len(owner) // n) == owner]
    period = owner[: sizes[0]]
    return Layout(len(owner) // sizes[0], tuple((part, len(list(run))) for part, run in itertools.groupby(period)))
