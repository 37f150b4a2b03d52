"""What the trunk makes once for all layers, handed to each as one more input: masks, lengths, angles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from surgeon.graph import Graph, copied
from surgeon.wiring import add_input, call_of, inputs_of


class Handed:
    """A copy of a graph whose layers are given more than they were.

    Attributes:
        made: the copy.
        trunk: its trunk.
        inputs: of the trunk, by name.
    """

    def __init__(self, graph: Graph) -> None:
        self.made = graph.copy()
        self.made.trunk, _ = copied(graph.trunk)
        self.trunk = self.made.trunk
        self.inputs = {str(node.target): node for node in inputs_of(self.trunk)}

    def given(self, part: fx.Graph, path: str, node: fx.Node) -> Any:
        """What the trunk gives a layer for an input."""
        return call_of(self.trunk, path).args[inputs_of(part).index(node)]

    def hand(
        self, part: fx.Graph, paths: Sequence[str], source: fx.Node, label: str, make: Callable[[fx.Node], fx.Node]
    ) -> fx.Node:
        """One more input of a layer, made in the trunk of what it gives for another one."""
        name = f"{source.target}_{label}"
        known = next((node for node in inputs_of(part) if node.target == name), None)
        if known is not None:
            return known
        for path in paths:
            call = call_of(self.trunk, path)
            call.args = (*call.args, make(self.given(part, path, source)))
        return add_input(part, name)
