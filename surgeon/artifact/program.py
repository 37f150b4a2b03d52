"""A lowered graph as JSON, and back: nodes are rows of (op, name, target, args, kwargs); arguments number the nodes.

    {"outputs": […], "trunk": [row, …], "graphs": [[row, …], …], "layers": {path: number of its graph},
     "tensors": {name: is it a parameter}, "ties": {alias: name}, "attentions": […], "first": the first position}

Equal layers share one graph here as they do in memory, so the file does not grow with the depth of the model. Only
operators of torch and of surgeon, and Python's own arithmetic, can be named: reading a program runs nothing else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph, TensorSpec

_NAMESPACES = ("aten", "surgeon")
_MODULES = {"operator": operator, "_operator": operator, "math": math}
_ARITHMETIC = (
    "getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge",
    "and_", "or_", "not_", "floor", "ceil", "trunc", "sqrt",
)  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"torch.{name}": getattr(torch, name) for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not")
}
_FUNCTIONS["builtins.getattr"] = getattr
_ATTRIBUTES = ("dtype", "device")
"""What a program may ask a tensor for."""
Row = list[Any]


@dataclass(frozen=True)
class Attention:
    """One attention's cache, and the learned columns in front of it.

    Attributes:
        layer: path of its layer, "" for the trunk.
        name: the module in it that holds the cache: `k_pages`, `v_pages`, `blocks`, `prefixes`.
        heads: query heads.
        kv: key and value heads.
        size: of a key.
        width: of a value.
        k: tensors `[kv, p, size]` that are the first columns of the keys, one after another.
        v: the same of the values.
    """

    layer: str
    name: str
    heads: int
    kv: int
    size: int
    width: int
    k: tuple[str, ...] = ()
    v: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """A graph that runs over pages, and its attentions in order; `first` is the position of a text's first token."""

    graph: Graph
    attentions: tuple[Attention, ...]
    first: int = 0


def to_json(program: Program) -> dict[str, Any]:
    """The program as JSON's types.

    Raises:
        UnsupportedError: a node calls what no program may.
    """
    graph = program.graph
    groups = graph.groups()
    numbers = {path: number for number, (_, paths) in enumerate(groups) for path in paths}
    return {
        "outputs": list(graph.outputs),
        "trunk": _rows(graph.trunk),
        "graphs": [_rows(part) for part, _ in groups],
        "layers": {path: numbers[path] for path in graph.layers},
        "tensors": {name: spec.parameter for name, spec in graph.tensors.items()},
        "ties": dict(graph.ties),
        "attentions": [asdict(attention) for attention in program.attentions],
        "first": program.first,
    }


def from_json(found: Mapping[str, Any], values: Mapping[str, torch.Tensor], where: str) -> Program:
    """The program of a file over these values.

    Raises:
        UsageError: the file is damaged.
        UnsupportedError: it calls an operator that is not known here.
    """
    try:
        graphs = [_graph(rows) for rows in found["graphs"]]
        tensors = {
            name: TensorSpec(tuple(values[name].shape), values[name].dtype, parameter=parameter)
            for name, parameter in found["tensors"].items()
        }
        layers = {path: graphs[number] for path, number in found["layers"].items()}
        config: Any = None  # a config belongs to the model's code, of which nothing is left
        graph = Graph(
            config, "causal-lm", _graph(found["trunk"]), layers, tensors, values, dict(found["ties"]),
            tuple(found["outputs"]), source=where,
        )  # fmt: skip
        entries = [{**one, "k": tuple(one["k"]), "v": tuple(one["v"])} for one in found["attentions"]]
        return Program(graph, tuple(Attention(**one) for one in entries), int(found["first"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"the program is damaged: {type(error).__name__} {error}", where, "export it again") from error


def _rows(graph: fx.Graph) -> list[Row]:
    number = {node: position for position, node in enumerate(graph.nodes)}
    return [
        [node.op, node.name, _name(node), _written(node.args, number), _written(dict(node.kwargs), number)]
        for node in graph.nodes
    ]


def _graph(rows: list[Row]) -> fx.Graph:
    graph, nodes = fx.Graph(), list[fx.Node]()
    for op, name, target, args, kwargs in rows:
        given = tuple(_read(args, nodes))
        if op == "output":
            nodes.append(graph.output(tuple(given[0])))
            continue
        function = _function(target) if op == "call_function" else target
        if function is getattr and given[1:] not in [(name,) for name in _ATTRIBUTES]:
            raise UnsupportedError(f"a program may not call getattr of {given[1]}", "", "export the artifact again")
        nodes.append(graph.create_node(op, function, given, _read(kwargs, nodes), name))
    return graph


def _name(node: fx.Node) -> str:
    """What a node calls, as text.

    Raises:
        UnsupportedError: it is not among what a program may call.
    """
    target: Any = node.target
    if node.op != "call_function":
        return str(target)
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return str(target)
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if module in _MODULES and name in _ARITHMETIC and getattr(_MODULES[module], name, None) is target:
        return f"{module.removeprefix('_')}.{name}"
    known = next((text for text, function in _FUNCTIONS.items() if function is target), None)
    if known is None or (target is getattr and node.args[1] not in _ATTRIBUTES):
        what = f"the artifact has no form for {name or target}"
        raise UnsupportedError(what, str(node.meta.get("path") or node.name), "export it with --target onnx or hf")
    return known


def _function(text: str) -> Callable[..., Any]:
    space, _, name = text.partition(".")
    if text in _FUNCTIONS:
        return _FUNCTIONS[text]
    if space in _MODULES and name in _ARITHMETIC and hasattr(_MODULES[space], name):
        found: Callable[..., Any] = getattr(_MODULES[space], name)
        return found
    if space in _NAMESPACES:
        packet, _, overload = name.partition(".")
        try:
            called: Callable[..., Any] = getattr(getattr(getattr(torch.ops, space), packet), overload)
        except AttributeError as error:
            raise UnsupportedError(f"the program calls {text}, which is not here", "", "update surgeon") from error
        return called
    raise UnsupportedError(f"a program may not call {text}", "", "export the artifact again")


def _written(value: Any, number: dict[fx.Node, int]) -> Any:
    """An argument as JSON's types; what JSON has no type for is an object with one key that says what it is."""
    if isinstance(value, fx.Node):
        return {"node": number[value]}
    if isinstance(value, list | tuple):
        return [_written(item, number) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _written(item, number) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_written(item, number) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    for kind, names in ((torch.dtype, "dtype"), (torch.memory_format, "memory_format"), (torch.layout, "layout")):
        if isinstance(value, kind):
            return {names: str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedError(f"the artifact has no form for an argument {type(value).__name__}", repr(value)[:80])


def _read(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, inner), = value.items()  # fmt: skip
    if kind == "node":
        return nodes[inner]
    if kind == "dict":
        return {key: _read(item, nodes) for key, item in inner.items()}
    if kind == "slice":
        return slice(*(_read(item, nodes) for item in inner))
    if kind == "float":
        return float(inner)
    if kind == "device":
        return torch.device(inner)
    if kind in ("dtype", "memory_format", "layout"):
        return getattr(torch, inner)
    raise ValueError(f"an argument of kind {kind}")
