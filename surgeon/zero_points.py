"""Folding adapters that are constant over groups of inputs into the zero points of group-wise integers: exact.

    w + d = scale · (code − zero) + d = scale · (code − zero'),   zero' = zero − d / scale

Codes and scales stay as they are (Xu et al. 2024, §3.3). It is exact because the zero points are floating point:
rounded to integers they would lose most of the adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from surgeon.errors import UnsupportedError, UsageError
from surgeon.fold import Fold, by_weight, folds
from surgeon.graph import Graph, Holding
from surgeon.normal import Base, Normal
from surgeon.strip import without

Read = Callable[[], torch.Tensor]


def fold_zero_points(graph: Graph) -> Graph:
    """The graph without its adapters, whose zero points hold what they computed.

    Raises:
        UsageError: there is no adapter to merge.
        UnsupportedError: an adapter is not constant over the groups of the integers, or stands over another weight.
    """
    found = folds(graph)
    if not found:
        raise UsageError("there is no adapter to merge", graph.source, "apply one first: surgeon apply --method qalora")
    groups = by_weight(graph, found)
    for name, group in groups.items():
        _require_foldable(graph, name, group)
    result = without(graph, {item.owner for item in found})
    for name, group in groups.items():
        holding = _holding(graph, name)
        zero, scale = holding.parts["zero"], holding.parts["scale"]
        read = functools.partial(_moved, graph.inserted[zero], graph.inserted[scale], group)
        result.inserted[zero] = read
    return result


def unfoldable(graph: Graph) -> str:
    """Why the adapters of a graph do not fold into zero points, or ""."""
    try:
        for name, group in by_weight(graph, folds(graph)).items():
            _require_foldable(graph, name, group)
    except UnsupportedError as error:
        return f"{error.where}: {error.what}"
    return ""


def _require_foldable(graph: Graph, name: str, group: list[Fold]) -> None:
    spec = graph.tensors[name]
    if spec.held is None or "zero" not in spec.held.parts:
        hint = "apply intq first, or merge --into dequant"
        raise UnsupportedError("the weight has no zero points", name, hint)
    zeros = next((step for step in graph.applied if step.name == spec.held.owner), None)
    if getattr(zeros, "zero", "float") != "float":
        hint = "quantise with intq(zero=float), or merge --into dequant"
        raise UnsupportedError("its zero points are integers, which cannot hold an adapter", name, hint)
    size = group[0].site.inp // graph.tensors[spec.held.parts["zero"]].shape[1]
    for item in group:
        normal = item.normal(Base(functools.partial(_unread, name)))
        if normal.u is not None or normal.s is not None or normal.bias is not None or normal.group % size:
            what = f"{item.step.name} is not constant over groups of {size} inputs"
            hint = "train qalora, whose merge is exact, or merge --into dequant"
            raise UnsupportedError(what, name, hint)


def _unread(name: str) -> torch.Tensor:
    hint = "train qalora, whose merge is exact, or merge --into dequant"
    raise UnsupportedError("the adapter reads the weight, so it is not constant over groups", name, hint)


def _holding(graph: Graph, name: str) -> Holding:
    holding = graph.tensors[name].held
    assert holding is not None
    return holding


def _moved(zero: Read, scale: Read, group: list[Fold]) -> torch.Tensor:
    """zero − d / scale, computed in fp64 and rounded once."""
    old, step = zero(), scale().double()
    change = torch.zeros_like(step)
    for item in group:
        change += _per_group(item.normal(Base(functools.partial(_unread, item.site.weight))), step.shape[1])
    return (old.double() - change / step).to(old.dtype)


def _per_group(normal: Normal, groups: int) -> torch.Tensor:
    """scale · b a `[out, groups]` in fp64."""
    assert normal.a is not None
    assert normal.b is not None
    product = normal.b.double() @ normal.a.double() * (normal.scale / normal.divisor)
    return product.repeat_interleave(groups // product.shape[1], -1)
