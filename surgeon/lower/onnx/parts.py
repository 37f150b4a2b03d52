"""A graph cut into parts that are lowered once each: the trunk without its layers, and every distinct layer.

All tensors are inputs of a part, so lowering sees no weight: nothing is folded, merged or copied, and the cost does not
grow with the number of equal layers. Shapes come from two runs on meta tensors of different sizes; what differs between
them is dynamic.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.compile import without_dropout
from surgeon.errors import UnsupportedError
from surgeon.graph import INPUT, MODEL_DEVICE, MODEL_DTYPE, Graph, copied, sweep
from surgeon.lower.onnx import norms
from surgeon.lower.onnx.codes import Form, place
from surgeon.lower.onnx.registry import read_once
from surgeon.lower.onnx.standard import linear, standardise

aten = torch.ops.aten
META = torch.device("meta")
SIZES = (
    {"batch": 2, "choices": 4, "new": 3, "past": 5, "rank": 6, "prefix": 13, "adapters": 17, "src": 43, "held": 19}
    | {"cross": 71},
    {"batch": 3, "choices": 5, "new": 7, "past": 11, "rank": 10, "prefix": 29, "adapters": 31, "src": 61, "held": 23}
    | {"cross": 89},
)
"""Two sets of sizes without coincidences between sums and products; none is 0 or 1, which torch bakes in."""


@dataclass(frozen=True)
class Part:
    """What is lowered at once.

    Attributes:
        graph: the nodes; tensors of the model are inputs, after those it had.
        tensors: the model's tensors it reads, by their names in the layer.
    """

    graph: fx.Graph
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """What the trunk computes between two layers.

    Attributes:
        graph: its nodes.
        inputs: what it reads, as nodes of the trunk: inputs, tensors, results of layers and of earlier segments.
        outputs: what others read of it, as nodes of the trunk.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    outputs: list[fx.Node]


def input_name(node: fx.Node) -> str:
    """What users call an input of the trunk."""
    return str(node.meta.get(INPUT, node.target))


def turnable(graph: Graph) -> set[str]:
    """Matrices that one linear reads and nothing else does: they can be stored `[in, out]`."""
    linears: dict[str, set[tuple[int, str]]] = {}
    others = set(graph.ties) | set(graph.ties.values())
    for prefix, node in graph.nodes():
        if node.op != "get_attr":
            continue
        name = graph.resolve(prefix + str(node.target))
        for user in node.users:
            if user.target is aten.linear.default and user.args[1] is node and user.args[0] is not node:
                linears.setdefault(name, set()).add((id(node.graph), str(node.target)))
            else:
                others.add(name)
    alone = {name for name, readers in linears.items() if len(readers) == 1 and name not in others}
    return {name for name in alone if len(graph.tensors[name].shape) == 2}


def lowered(
    part: fx.Graph, prefixes: list[str], turned: set[str], graph: Graph, dtype: torch.dtype, form: Form
) -> Part:
    """A copy of a graph in standard operators with its tensors as inputs.

    Linears whose weight can be turned in every layer that shares the graph read it as `[in, out]`; those in codes are
    what `surgeon.lower.onnx.codes` makes of them.
    """
    fresh, _ = copied(without_dropout(part))
    place(fresh, prefixes[0], graph, form)
    last = [node for node in fresh.nodes if node.op == "placeholder"][-1]
    constants: dict[fx.Node, Any] = {}
    tensors: dict[str, fx.Node] = {}
    for node in list(fresh.nodes):
        if node.op != "get_attr":
            continue
        target = str(node.target)
        if target in (MODEL_DTYPE, MODEL_DEVICE):
            constants[node] = dtype if target == MODEL_DTYPE else META
            continue
        if target not in tensors:
            with fresh.inserting_after(last):
                last = tensors[target] = fresh.placeholder("tensor_" + target.replace(".", "_"))
            last.meta["val"] = node.meta.get("val")
        if all(graph.resolve(prefix + target) in turned for prefix in prefixes):
            for user in node.users:
                user.target = linear
        node.replace_all_uses_with(tensors[target])
    for node in fresh.nodes:
        if any(source in constants for source in node.all_input_nodes):
            node.args = fx.node.map_arg(node.args, lambda n: constants.get(n, n))
            node.kwargs = fx.node.map_arg(node.kwargs, lambda n: constants.get(n, n))
        if isinstance(node.kwargs.get("device"), torch.device):
            node.kwargs = {**node.kwargs, "device": META}
    if form.norms:
        norms.fuse(fresh, form.norms)
    standardise(fresh)
    sweep(fresh)
    return Part(fresh, tuple(tensors))


def segments(trunk: fx.Graph, numbers: Mapping[fx.Node, int]) -> dict[int, Segment]:
    """The trunk's nodes by the number of layers that must have run before them, as early as they can be.

    Lowered one by one, because an exporter that sees two sizes are equal reads either, and would read the size of a
    layer's result to compute what that layer is given.

    Args:
        trunk: the lowered trunk, with its layer calls.
        numbers: sizes that are always the same; they are written into the segments.
    """
    level: dict[fx.Node, int] = {}
    calls = 0
    for node in trunk.nodes:
        level[node] = max((level[source] for source in node.all_input_nodes), default=0)
        if node.op == "call_module":
            calls += 1
            level[node] = calls
    found: dict[int, list[fx.Node]] = {}
    for node in trunk.nodes:
        if node.op == "call_function" and not is_result(node) and node not in numbers:
            found.setdefault(level[node], []).append(node)
    return {number: _segment(nodes, numbers) for number, nodes in sorted(found.items())}


def is_result(node: fx.Node) -> bool:
    """Whether a node takes one result of a layer."""
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].op == "call_module"


def _segment(nodes: list[fx.Node], numbers: Mapping[fx.Node, int]) -> Segment:
    inside = set(nodes)
    read = [source for node in nodes for source in node.all_input_nodes]
    inputs = [node for node in dict.fromkeys(read) if node not in inside and node not in numbers]
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    fresh = fx.Graph()
    copies: dict[fx.Node, Any] = dict(numbers)
    for node in inputs:
        copies[node] = fresh.placeholder(node.name)
    for node in nodes:
        args, kwargs = (fx.node.map_arg(given, copies.get) for given in (node.args, node.kwargs))
        copies[node] = fresh.create_node("call_function", node.target, args, kwargs)
    fresh.output(tuple(copies[node] for node in outputs))
    return Segment(fresh, inputs, outputs)


class Shapes(fx.Interpreter):
    """Runs a lowered graph on meta tensors and keeps what every node is.

    Attributes:
        env: node of the trunk → its value.
        given: for every distinct layer graph (by id), what it was called with, its tensors included.
    """

    def __init__(
        self, graph: Graph, trunk: Part, layers: Mapping[int, Part], tensors: Callable[[Part, str], list[torch.Tensor]]
    ) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=False, graph=trunk.graph)
        self.model, self.layers, self.tensors = graph, layers, tensors
        self.given: dict[int, tuple[Any, ...]] = {}
        self._returned: dict[int, Any] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A layer; equal layers return alike and are run once."""
        key = id(self.model.layers[target])
        if key not in self.given:
            part = self.layers[key]
            self.given[key] = (*args, *self.tensors(part, f"{target}."))
            self._returned[key] = fx.Interpreter(torch.nn.Module(), graph=part.graph).run(*self.given[key])
        return self._returned[key]


def dynamic(first: Any, second: Any) -> Any:
    """What differs between two runs, as torch.export wants to be told."""
    if isinstance(first, torch.Tensor):
        pairs = enumerate(zip(first.shape, second.shape, strict=True))
        return {axis: torch.export.Dim.DYNAMIC for axis, (a, b) in pairs if a != b}
    return torch.export.Dim.DYNAMIC if first != second else None


def lower_part(part: fx.Graph, first: tuple[Any, ...], second: tuple[Any, ...], opset: int) -> Any:
    """A part as an onnx_ir graph whose inputs are those of the part, in order.

    Raises:
        UnsupportedError: an operator has no ONNX form, or a size was baked in.
    """
    names = [f"in_{position}" for position in range(len(first))]
    shapes = tuple(dynamic(a, b) for a, b in zip(first, second, strict=True))
    module = fx.GraphModule(torch.nn.Module(), part)
    try:
        with silence(), read_once(), torch.no_grad():
            program = torch.export.export(module, tuple(map(_alone, first)), dynamic_shapes=shapes)
            made = torch.onnx.export(program, (), input_names=names, opset_version=opset, verbose=False)
    except Exception as error:  # both exporters raise every kind of exception for what they cannot do
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(f"no ONNX form: {reason}", hint="--target hf writes a checkpoint") from error
    assert made is not None
    if len(made.model.graph.inputs) != len(first):  # torch bakes in an integer that was the same for both lengths
        what = "no ONNX form: a size within a layer does not follow the length of short texts (blocks of tokens)"
        raise UnsupportedError(what, hint="--target hf writes a checkpoint")
    return made.model


def _alone(given: Any) -> Any:
    """A tensor that is no view of another: torch.export would guard what it is a view of."""
    return given.clone() if isinstance(given, torch.Tensor) and given._base is not None else given


@contextmanager
def silence() -> Iterator[None]:
    """The exporters warn about what is done on purpose."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
