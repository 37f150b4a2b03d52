"""Weights of the base that trained whole beside an adapter (a new head), as factors over the base's: W' = W + Δ."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Sequence

import torch

from surgeon.graph import Graph
from surgeon.hold import is_held
from surgeon.normal import Normal
from surgeon.sites import Site, sites


def digest(graph: Graph, modules: Sequence[str]) -> str:
    """The sha256 of the base's values of modules that its checkpoint has none of: a new head, drawn by a seed."""
    prefixes, found = tuple(f"{path}." for path in modules), hashlib.sha256()
    for name in sorted(name for name, spec in graph.tensors.items() if not spec.owner and name.startswith(prefixes)):
        value = graph.values[name]
        found.update(f"{name}{tuple(value.shape)}".encode() + value.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def linears(graph: Graph) -> dict[str, Site]:
    """Weight that trained → the one linear that reads it."""
    readers: dict[str, dict[str, Site]] = {}
    for site in sites(graph):
        readers.setdefault(graph.resolve(site.weight), {})[site.path] = site
    trained = [name for name in readers if name in graph.inserted and name in graph.values and not is_held(graph, name)]
    return {name: next(iter(readers[name].values())) for name in trained if len(readers[name]) == 1}


def settled(graph: Graph, names: Collection[str]) -> Graph:
    """The graph as if those tensors did not train: its base has codes of them."""
    made = {name: dataclasses.replace(graph.tensors[name], trainable=False) for name in names}
    return dataclasses.replace(graph, tensors={**graph.tensors, **made})


def change(graph: Graph, site: Site) -> torch.Tensor:
    """Δ `[out, in]` of a linear whose weight trained, in fp32."""
    now, before = (values.float() for values in (graph.inserted[site.weight](), graph.values[site.weight]))
    return site.matrix(now) - site.matrix(before)


def factors(delta: torch.Tensor) -> Normal:
    """Δ as b a, one of them the identity: the rank is the smaller side's size."""
    out, inp = delta.shape
    if out <= inp:
        return Normal(a=delta, b=torch.eye(out))
    return Normal(a=torch.eye(inp), b=delta)
