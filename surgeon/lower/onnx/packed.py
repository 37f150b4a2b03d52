"""Queries, keys and values of one product, where GroupQueryAttention reads them so and their weights are in codes.

Codes are written by the export anyway, so three matrices can stand one above the other: one call of MatMulNBits rounds
its input once. Weights that are bound stay three: they lie in the checkpoint's file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from surgeon.graph import Graph, Holding, TensorSpec, copied
from surgeon.lower.onnx import group_query
from surgeon.lower.onnx.codes import INT, SIDE, fits
from surgeon.quantised import HELD

_PARTS = ("codes", "scale", "zero")


def packed(graph: Graph) -> Graph:
    """The graph with the products of every attention as one, where that is possible."""
    made = graph.copy()
    for shared, paths in graph.groups():
        part, _ = copied(shared)
        found = [node for node in part.nodes if node.target is group_query.attention and _fits(graph, node, paths)]
        for node in found:
            _pack(made, part, paths, node)
        if found:
            made.layers.update(dict.fromkeys(paths, part))
    return made


def _fits(graph: Graph, node: fx.Node, paths: Sequence[str]) -> bool:
    """Whether the three are linears in integers of one kind that read the same, and nothing else reads them."""
    three: list[Any] = list(node.args[:3])
    if not all(isinstance(one, fx.Node) and one.target is INT and len(one.users) == 1 for one in three):
        return False
    kinds = {(one.args[0], one.args[1] is None, one.kwargs["bits"], _groups(graph, one, paths[0])) for one in three}
    sides = [f"{path}.{one.meta[HELD].target}{SIDE}{part}" for path in paths for one in three for part in "abus"]
    held, bits = _holding(graph, three[0], paths[0]), int(three[0].kwargs["bits"])
    return len(kinds) == 1 and fits(graph, held, bits) and not any(name in graph.tensors for name in sides)


def _groups(graph: Graph, node: fx.Node, path: str) -> int:
    return graph.tensors[_holding(graph, node, path).parts["scale"]].shape[1]


def _holding(graph: Graph, node: fx.Node, path: str) -> Holding:
    held = graph.tensors[graph.resolve(f"{path}.{node.meta[HELD].target}")].held
    assert held is not None
    return held


def _pack(made: Graph, part: fx.Graph, paths: Sequence[str], node: fx.Node) -> None:
    three: list[Any] = list(node.args[:3])
    module = str(three[0].meta[HELD].target).rpartition(".")[0].rpartition(".")[0]
    name = f"{module}.qkv" if module else "qkv"
    for path in paths:
        held = [_holding(made, one, path) for one in three]
        parts = {kind: f"{path}.{name}.{kind}" for kind in _PARTS}
        for kind, full in parts.items():
            _stack(made, full, [one.parts[kind] for one in held])
        shape = (made.tensors[parts["scale"]].shape[0], made.tensors[held[0].parts["codes"]].shape[1])
        holding = Holding(held[0].owner, parts, _no_weight)
        made.tensors[f"{path}.{name}.weight"] = TensorSpec(shape, owner=held[0].owner, held=holding)
        if three[0].args[1] is not None:
            _stack(made, f"{path}.{name}.bias", [made.resolve(f"{path}.{one.args[1].target}") for one in three])
    with part.inserting_before(node):
        bias = part.get_attr(f"{name}.bias") if three[0].args[1] is not None else None
        args = (three[0].args[0], bias, *(part.get_attr(f"{name}.{kind}") for kind in _PARTS))
        linear = part.call_function(INT, args, {"bits": three[0].kwargs["bits"]})
    linear.meta = {**three[0].meta, HELD: replace(three[0].meta[HELD], target=f"{name}.weight")}
    node.args = (linear, None, None, *node.args[3:])
    for one in three:
        part.erase_node(one)


def _stack(made: Graph, name: str, pieces: Sequence[str]) -> None:
    """A tensor of others, one after the other, read when it is written."""
    specs = [made.tensors[piece] for piece in pieces]
    shape = (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:])
    made.tensors[name] = replace(specs[0], shape=shape)
    made.inserted[name] = functools.partial(_read, made, tuple(pieces))


def _read(graph: Graph, pieces: Sequence[str]) -> torch.Tensor:
    return torch.cat([graph.inserted[name]() if name in graph.inserted else graph.values[name] for name in pieces])


def _no_weight(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    raise AssertionError("the weight of packed codes is never decoded")
