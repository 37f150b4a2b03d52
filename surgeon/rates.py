"""Learning rates by parameter: what methods ask for, as parameter groups of an optimiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgeon.fold import folds, rest
from surgeon.graph import Graph
from surgeon.passes.base import Adapter
from surgeon.run import owners


def rates(graph: Graph, lr: float) -> dict[str, float]:
    """Full names of what trains → its highest learning rate, where a method wants another than `lr`."""
    found: dict[str, float] = {}
    steps = {owner: step for owner, step in owners(graph.applied).items() if isinstance(step, Adapter)}
    for item in (*folds(graph), *rest(graph)):
        for param in item.params:
            name = item.site.tensor(item.owner, param)
            if name in graph.tensors:
                found[name] = item.step.rate(param, item.site, lr)
    for name, spec in graph.trainable().items():
        for step in steps.values() if not spec.owner else ():
            found[name] = step.rate(name, None, lr)
    return {name: rate for name, rate in found.items() if rate != lr}


def grouped(model: nn.Module, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """Parameter groups split by the rates that the methods of a model want; the groups themselves if they want none.

    A scheduler multiplies the rate of every group by the same factor.
    """
    graph = getattr(model, "graph", None)
    wanted = rates(graph, lr) if isinstance(graph, Graph) else {}
    if not wanted:
        return groups
    by_id = {id(parameter): wanted.get(name, lr) for name, parameter in model.named_parameters()}
    made = []
    for group in groups:
        apart: dict[float, list[nn.Parameter]] = {lr: []}
        for parameter in group["params"]:
            apart.setdefault(by_id[id(parameter)], []).append(parameter)
        made += [{**group, "params": params, "lr": rate} for rate, params in apart.items() if params]
    return made
