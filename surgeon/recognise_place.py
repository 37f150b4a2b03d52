"""Where an attention is rewritten: the layers that share it, what they are given, and how nodes are made there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from surgeon import wiring
from surgeon.graph import Graph, path_of, val
from surgeon.recognise_scores import ROW_MAJOR
from surgeon.recognise_values import Buffers, Sizes, Values, expression

aten = torch.ops.aten


@dataclass
class Place:
    """A layer graph, or the trunk, whose attentions are rewritten for every layer in `paths` at once."""

    graph: Graph
    part: fx.Graph
    paths: list[str]
    buffers: Buffers

    def values(self, sizes: Sizes, *, evaluation: bool = False) -> Values:
        """What the nodes of this part are for given sizes."""
        return Values(self.graph, self.part, self.call, sizes, self.buffers, evaluation=evaluation)

    @property
    def call(self) -> fx.Node | None:
        """The first call of the first layer; None for the trunk."""
        return wiring.calls_of(self.graph.trunk, self.paths[0])[0] if self.paths[0] else None

    def outer(self, node: fx.Node) -> fx.Node | None:
        """What the trunk hands in for an input of the layer, unless a layer computed it."""
        if self.call is None or node.op != "placeholder" or node.graph is not self.part:
            return None
        given = self.call.args[wiring.inputs_of(self.part).index(node)]
        return given if isinstance(given, fx.Node) and not from_layer(given) else None

    def held(self, node: fx.Node) -> fx.Node:
        """A node of the trunk as an input of the layer; a node of the layer as it is."""
        if node.graph is self.part or self.call is None:
            return node
        for inner, given in zip(wiring.inputs_of(self.part), self.call.args, strict=True):
            if given is node:
                return inner
        taken = {str(other.target) for other in wiring.inputs_of(self.part)} | {n.name for n in self.part.nodes}
        label = node.name
        while label in taken:
            label += "_"
        for path in self.paths:
            for call in wiring.calls_of(self.graph.trunk, path):
                call.args = (*call.args, node)
        made = wiring.add_input(self.part, label)
        made.meta.update(val=node.meta["val"], path="")
        return made


@dataclass
class Writer:
    """Writes nodes before the one that is replaced."""

    part: fx.Graph
    before: fx.Node
    made: set[fx.Node] = field(default_factory=set)

    def old(self, node: fx.Node) -> fx.Node:
        """The node of the model's own code that a written one was made from."""
        return self.old(source(node)) if node in self.made else node

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A node after those written so far."""
        with self.part.inserting_before(self.before):
            node = self.part.call_function(target, args, kwargs)
        given = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        self.made.add(node)
        mode = next(n.meta["val"].fake_mode for n in self.part.nodes if isinstance(n.meta.get("val"), FakeTensor))
        with mode:
            node.meta.update(val=target(*given[0], **given[1]), path=path_of(self.before))
        return node


def from_layer(node: Any) -> bool:
    """Whether an argument of a layer is, or is computed from, what another layer returned."""
    seen: set[fx.Node] = set()
    queue = [node] if isinstance(node, fx.Node) else []
    while queue:
        current = queue.pop()
        if current.op == "call_module" or _is_embedding(current):
            return True
        if current not in seen and not isinstance(current.meta.get("val"), torch.SymInt):
            seen.add(current)
            queue += current.all_input_nodes
    return False


def _is_embedding(node: fx.Node) -> bool:
    return node.target is aten.embedding.default


def is_view(node: fx.Node) -> bool:
    """Whether a node only changes the shape of what it reads."""
    return node.target in ROW_MAJOR


def alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes have the same shape, whatever the sizes."""
    return shape(one) == shape(other)


def shape(node: fx.Node) -> list[Any]:
    """The sizes of a node as formulas."""
    return [expression(size) for size in val(node).shape]


def source(node: fx.Node) -> fx.Node:
    """What a node of one input reads."""
    found = node.args[0]
    assert isinstance(found, fx.Node)
    return found
