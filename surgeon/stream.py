"""Running a graph that does not fit in memory: one weight at a time, straight from the checkpoint.

Every tensor is read where it is used, brought to the dtype of the arithmetic, and dropped after; mapped pages are given
back after every layer. The peak is the largest weight twice, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from surgeon import ops
from surgeon.compile import without_dropout
from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, Graph
from surgeon.module import read_tensor

assert ops  # registers the operators
aten = torch.ops.aten


class StreamingExecutor:
    """Evaluates a graph on given inputs, reading its tensors as it goes.

    Args:
        graph: a graph with values.
        dtype: of the arithmetic; weights are cast to it one at a time.
        release: called after every layer, to give mapped pages back.
    """

    def __init__(
        self, graph: Graph, dtype: torch.dtype = torch.float32, release: Callable[[], None] = lambda: None
    ) -> None:
        self.graph, self.dtype, self.release = graph, dtype, release
        self._trunk = without_dropout(graph.trunk)
        self._layers = {id(part): without_dropout(part) for part, _ in graph.groups()}

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        """The graph's outputs, from its inputs in order."""
        result: tuple[Any, ...] = self._run(self._trunk, "", inputs)
        return result

    def _run(self, part: fx.Graph, prefix: str, inputs: tuple[Any, ...]) -> Any:
        remaining = {node: len(node.users) for node in part.nodes}
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in part.nodes:
            if node.op == "get_attr":
                continue
            if node.op == "placeholder":
                values[node] = next(given)
                continue
            if node.op == "output":
                return self._resolved(node.args[0], values, prefix)
            values[node] = self._step(node, values, prefix)
            for source in node.all_input_nodes:
                remaining[source] -= 1
                if remaining[source] == 0:
                    values.pop(source, None)
        raise AssertionError("a graph ends with its output")

    def _step(self, node: fx.Node, values: dict[fx.Node, Any], prefix: str) -> Any:
        if node.target is aten.embedding.default and node.args[0].op == "get_attr":
            table = self._read(node.args[0], prefix, cast=False)
            rows = self._resolved(node.args[1:], values, prefix)
            return aten.embedding.default(table, *rows, **node.kwargs).to(self.dtype)
        args = self._resolved(node.args, values, prefix)
        kwargs = self._resolved(node.kwargs, values, prefix)
        if node.op == "call_module":
            path = str(node.target)
            result = self._run(self._layers[id(self.graph.layers[path])], f"{path}.", args)
            self.release()
            return result
        return node.target(*args, **kwargs)

    def _resolved(self, args: Any, values: dict[fx.Node, Any], prefix: str) -> Any:
        def value(node: fx.Node) -> Any:
            return self._read(node, prefix) if node.op == "get_attr" else values[node]

        return fx.node.map_arg(args, value)

    def _read(self, node: fx.Node, prefix: str, *, cast: bool = True) -> Any:
        if node.target == MODEL_DTYPE:
            return self.dtype
        if node.target == MODEL_DEVICE:
            return torch.device("cpu")
        name = self.graph.resolve(prefix + str(node.target))
        return read_tensor(self.graph, name, self.dtype if cast else None, torch.device("cpu"))
