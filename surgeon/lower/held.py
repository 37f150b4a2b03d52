"""Merging over weights that are held in codes: into what the codes decode to, which the adapter was trained on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch

from surgeon.fold import Fold, normals, stacked, value_of
from surgeon.graph import Graph
from surgeon.hold import held_value
from surgeon.lower.stream import Delta, WholeDelta
from surgeon.sites import Site, sites
from surgeon.unconvert import stored_parts
from surgeon.weights import ModelWeights


def held_names(graph: Graph) -> list[str]:
    """The weights that are held in codes."""
    return [name for name, spec in graph.tensors.items() if spec.held is not None]


def held_deltas(graph: Graph, weights: ModelWeights, groups: Mapping[str, list[Fold]]) -> dict[str, Delta]:
    """What becomes of every held weight, by stored names: dequantised, adapters folded in. One is made at a time.

    Raises:
        UnsupportedError: one is stored in parts and its conversion cannot be reverted.
    """
    at = {site.weight: site for site in sites(graph)}
    deltas: dict[str, Delta] = {}
    for name in held_names(graph):
        value = functools.partial(_merged, graph, at[name], groups.get(name, []))
        stored = weights.direct(name)
        if stored is not None:
            deltas[stored] = WholeDelta(functools.partial(_instead, value))
            continue
        change = value() - graph.values[name].float()
        for part, tensor in stored_parts(weights, {name: change}).items():
            deltas[part] = WholeDelta(tensor.add)
    return deltas


def _merged(graph: Graph, site: Site, group: list[Fold]) -> torch.Tensor:
    """The weight as it is stored, in fp32."""
    weight = held_value(graph, site.weight)
    if not group:
        return weight
    bias = functools.partial(value_of, graph, site.bias) if site.bias else lambda: None
    found = normals(group, lambda: site.matrix(weight), bias)
    return site.stored(stacked(site.matrix(weight), found))


def _instead(value: Callable[[], torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    return value().to(weight.dtype)
