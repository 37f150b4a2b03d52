"""Inputs and outputs of a trunk and its layers, added, ordered and dropped again."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from surgeon.errors import UnsupportedError
from surgeon.graph import INPUT, Graph, copied


def inputs_of(part: fx.Graph) -> list[fx.Node]:
    """The placeholders."""
    return [node for node in part.nodes if node.op == "placeholder"]


def add_input(part: fx.Graph, name: str) -> fx.Node:
    """A placeholder after those there are; `name` is what users see, dots and all."""
    with part.inserting_after(inputs_of(part)[-1]):
        made = part.placeholder(name.replace(".", "_"))
    if str(made.target) != name:
        made.meta[INPUT] = name
    return made


def output_of(part: fx.Graph) -> fx.Node:
    """The output node."""
    return next(iter(reversed(part.nodes)))


def add_result(part: fx.Graph, node: fx.Node) -> int:
    """One more result at the end; returns its position."""
    output = output_of(part)
    results: Any = output.args[0]
    output.args = ((*results, node),)
    return len(results)


def call_of(trunk: fx.Graph, path: str) -> fx.Node:
    """The call of a layer.

    Raises:
        UnsupportedError: it is called more than once.
    """
    calls = calls_of(trunk, path)
    if len(calls) != 1:
        raise UnsupportedError(f"the layer is called {len(calls)} times", path)
    return calls[0]


def calls_of(trunk: fx.Graph, path: str) -> list[fx.Node]:
    """Every call of a layer, in order: ALBERT calls its one layer again and again."""
    return [node for node in trunk.nodes if node.op == "call_module" and node.target == path]


def result_of(trunk: fx.Graph, path: str, position: int) -> fx.Node:
    """A node for one result of a layer, after its call."""
    call = call_of(trunk, path)
    with trunk.inserting_after(call):
        return trunk.call_function(operator.getitem, (call, position))


def order(graph: Graph, key: Callable[[str], Any]) -> None:
    """Sort the trunk's inputs and outputs by a key of their public names; equal keys keep their order."""
    inputs = inputs_of(graph.trunk)
    names = dict(zip(inputs, graph.inputs, strict=True))
    arranged = sorted(inputs, key=lambda node: key(names[node]))
    for before, after in itertools.pairwise(arranged):
        before.append(after)
    output = output_of(graph.trunk)
    results: Any = output.args[0]
    pairs = sorted(zip(graph.outputs, results, strict=True), key=lambda pair: key(pair[0]))
    graph.outputs = tuple(name for name, _ in pairs)
    output.args = (tuple(node for _, node in pairs),)


def prune(graph: Graph) -> None:
    """Drop what no output needs: inputs of layers and of the model, whole layers, and the tensors only those read.

    Tensors that no node reads to begin with stay: adapters beside codes, which an export gives their nodes, and weights
    that codes stand for, as long as their codes are read.
    """
    unread = graph.tensors.keys() - _read(graph)
    for shared, paths in graph.groups():
        part, _ = copied(shared)
        part.eliminate_dead_code(is_impure_node=_acts)
        keep = [bool(node.users) for node in inputs_of(part)]
        for path in paths:
            call = call_of(graph.trunk, path)
            call.args = tuple(arg for arg, kept in zip(call.args, keep, strict=True) if kept)
            graph.layers[path] = part
        _drop_inputs(part)
    graph.trunk.eliminate_dead_code(is_impure_node=_acts)
    _drop_inputs(graph.trunk)
    called = {str(node.target) for node in graph.trunk.nodes if node.op == "call_module"}
    graph.layers = {path: layer for path, layer in graph.layers.items() if path in called}
    read, held = _read(graph), {name: spec.held for name, spec in graph.tensors.items() if spec.held is not None}
    coded = {name for name, holding in held.items() if not read.isdisjoint(holding.parts.values())}
    kept = read | coded | (unread - held.keys())
    graph.tensors = {name: spec for name, spec in graph.tensors.items() if name in kept}
    graph.ties = {alias: name for alias, name in graph.ties.items() if name in kept}


def _read(graph: Graph) -> set[str]:
    return {graph.resolve(prefix + str(node.target)) for prefix, node in graph.nodes() if node.op == "get_attr"}


def _acts(node: fx.Node) -> bool:
    """Whether a node matters even if nothing reads it. Drawing random numbers does not: dead dropouts go."""
    schema = getattr(node.target, "_schema", None)
    return node.op in ("placeholder", "output") or bool(getattr(schema, "is_mutable", False))


def _drop_inputs(part: fx.Graph) -> None:
    for node in inputs_of(part):
        if not node.users:
            part.erase_node(node)
