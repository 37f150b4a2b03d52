"""Running a graph that does not fit in memory: one weight at a time, straight from the checkpoint.

Every tensor is read where it is used, brought to the dtype of the arithmetic, and dropped after; mapped pages are given
back after every linear. The peak is the largest weight as it is stored and a block of it as it is used, whatever the
depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from surgeon import ops
from surgeon.compile import without_dropout
from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, Graph
from surgeon.module import read_tensor

assert ops  # registers the operators
aten = torch.ops.aten
_BLOCK = 1 << 23  # elements of a weight in the dtype of the arithmetic at once: 32 MB in fp32


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
        return self.batch([inputs])[0]

    @torch.no_grad()
    def batch(self, lanes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        """The outputs for several sets of inputs of any shapes, each tensor being read once for all of them."""
        return self._run(self._trunk, "", [tuple(lane) for lane in lanes])

    def _run(self, part: fx.Graph, prefix: str, lanes: list[tuple[Any, ...]]) -> list[Any]:
        remaining = {node: len(node.users) for node in part.nodes}
        values: list[dict[fx.Node, Any]] = [{} for _ in lanes]
        position = 0
        for node in part.nodes:
            if node.op == "get_attr":
                continue
            if node.op == "placeholder":
                made = [lane[position] for lane in lanes]
                position += 1
            else:
                made = self._step(node, values, prefix)
            if node.op == "output":
                return made
            for lane, value in zip(values, made, strict=True):
                lane[node] = value
            for source in node.all_input_nodes:
                remaining[source] -= 1
                if remaining[source] == 0:
                    for lane in values:
                        lane.pop(source, None)
        raise AssertionError("a graph ends with its output")

    def _step(self, node: fx.Node, values: list[dict[fx.Node, Any]], prefix: str) -> list[Any]:
        """One node, for every lane."""
        if _multiplies(node):
            return self._linear(node, values, prefix)
        lookup = node.target is aten.embedding.default
        read = {
            source: self._read(source, prefix, cast=not (lookup and source is node.args[0]))
            for source in node.all_input_nodes
            if source.op == "get_attr"
        }
        args, kwargs = [], []
        for lane in values:
            resolved = fx.node.map_arg((node.args, node.kwargs), lambda n, own=lane: read[n] if n in read else own[n])
            args.append(resolved[0])
            kwargs.append(resolved[1])
        if node.op == "output":
            return [each[0] for each in args]
        if node.op == "call_module":
            path = str(node.target)
            results = self._run(self._layers[id(self.graph.layers[path])], f"{path}.", args)
            self.release()
            return results
        function: Any = node.target
        results = [function(*a, **k) for a, k in zip(args, kwargs, strict=True)]
        return [result.to(self.dtype) for result in results] if lookup else results

    def _linear(self, node: fx.Node, values: list[dict[fx.Node, Any]], prefix: str) -> list[Any]:
        """X Wᵀ + b with W brought to the dtype of the arithmetic block of rows by block."""
        weight = self._read(node.args[1], prefix, cast=False)
        bias = self._read(node.args[2], prefix) if len(node.args) > 2 and node.args[2] is not None else None
        rows = max(1, _BLOCK // max(1, weight.shape[1]))  # an adapter may have been pruned to nothing
        parts: list[list[torch.Tensor]] = [[] for _ in values]
        for start in range(0, max(1, weight.shape[0]), rows):
            block = weight[start : start + rows].to(self.dtype)
            for lane, found in zip(values, parts, strict=True):
                found.append(torch.nn.functional.linear(lane[node.args[0]], block))
        del weight
        self.release()
        results = [found[0] if len(found) == 1 else torch.cat(found, -1) for found in parts]
        return results if bias is None else [result + bias for result in results]

    def _read(self, node: fx.Node, prefix: str, *, cast: bool = True) -> Any:
        if node.target == MODEL_DTYPE:
            return self.dtype
        if node.target == MODEL_DEVICE:
            return torch.device("cpu")
        name = self.graph.resolve(prefix + str(node.target))
        return read_tensor(self.graph, name, self.dtype if cast else None, torch.device("cpu"))


def _multiplies(node: fx.Node) -> bool:
    """Whether a node brings what was computed through a weight (and is not a weight through a weight)."""
    if node.op != "call_function" or node.target is not aten.linear.default:
        return False
    return bool(node.args[1].op == "get_attr" and node.args[0].op != "get_attr")
