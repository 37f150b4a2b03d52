"""Graphs over values of which some are others: decoded codes, a head untied from the embedding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from surgeon.fold import value_of
from surgeon.graph import Graph
from surgeon.hold import held_value, holders
from surgeon.sites import LINEAR, sites
from surgeon.strip import without
from surgeon.targets import head_paths

Read = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Overlay(Mapping[str, torch.Tensor]):
    """Values of which some are others."""

    below: Mapping[str, torch.Tensor]
    above: Mapping[str, Read]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.above[name]() if name in self.above else self.below[name]

    def __iter__(self) -> Iterator[str]:
        yield from self.below
        yield from (name for name in self.above if name not in self.below)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self.above or name in self.below


def decoded(graph: Graph) -> Graph:
    """The graph with the weights that its codes decode to."""
    if not holders(graph):
        return graph
    names = [name for name, spec in graph.tensors.items() if spec.held is not None]
    values = Overlay(graph.values, {name: functools.partial(held_value, graph, name) for name in names})
    return dataclasses.replace(without(graph, holders(graph)), values=values)


def untied(graph: Graph) -> Graph:
    """The graph whose head has a weight of its own: codes of it, where the embedding reads rows of numbers."""
    tied = {f"{site.path}.weight": site.weight for site in sites(graph, LINEAR) if site.path in head_paths(graph)}
    broken = {alias: name for alias, name in tied.items() if graph.ties.get(alias) == name}
    if not broken:
        return graph
    made = graph.copy()
    for alias, name in broken.items():
        made.tensors[alias] = made.tensors[name]
        del made.ties[alias]
    own = {alias: functools.partial(value_of, graph, name) for alias, name in broken.items()}
    return dataclasses.replace(made, values=Overlay(graph.values, own))
