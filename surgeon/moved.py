"""Low-rank adapters whose first values are part of the weight: their pairs in a graph, and both as one for PEFT."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from surgeon import eva
from surgeon.first_factors import FirstFactor, FirstPair
from surgeon.fold import value_of
from surgeon.graph import Graph
from surgeon.passes.lora import Lora
from surgeon.replaced import Held
from surgeon.run import owners
from surgeon.sites import Site, sites


def first_values(graph: Graph, owner: str, step: Lora, seed: int) -> None:
    """Put the first values of pairs that are made together into a graph, computed when they are asked for.

    Those from data are there already, and find their places.
    """
    if step.init == "eva":
        eva.place(graph)
        return
    for site in _adapted(graph, owner, step):
        at = step.at(site)
        original = functools.partial(graph.values.__getitem__, site.weight)
        held = functools.partial(value_of, graph, site.weight)
        pair = FirstPair(step.init, site, at.rank, at.scale, seed, original, held)
        for word in ("a", "b", "a0", "b0") if step.moves else ("a", "b"):
            graph.inserted[site.tensor(owner, word)] = FirstFactor(pair, word)


def as_one_pair(graph: Graph, owner: str, step: Lora) -> tuple[Graph, Lora]:
    """A graph in whose adapter the pair that does not train is part of a and b, and that adapter: of twice the rank.

    It computes what it computed, and is for writing: its nodes still are those of two pairs.
    """
    made = graph.copy()
    for site in _adapted(graph, owner, step):
        for word, axis in (("a", 0), ("b", 1)):
            name, fixed = site.tensor(owner, word), site.tensor(owner, f"{word}0")
            both = torch.cat([made.inserted.pop(name)(), made.inserted.pop(fixed)()], axis)
            made.inserted[name] = Held(both)
            made.tensors[name] = dataclasses.replace(made.tensors[name], shape=tuple(both.shape))
            del made.tensors[fixed]
    factor = math.sqrt(2) if step.rslora else 2.0
    one = dataclasses.replace(
        step,
        init="kaiming",
        rank=2 * step.rank,
        alpha=factor * step.alpha,
        ranks=tuple((pattern, 2 * rank) for pattern, rank in step.ranks),
        alphas=tuple((pattern, factor * alpha) for pattern, alpha in step.alphas),
    )
    made.applied = tuple(one if name == owner else other for name, other in owners(graph.applied).items())
    return made, one


def _adapted(graph: Graph, owner: str, step: Lora) -> list[Site]:
    return [site for site in sites(graph, *step.kinds) if site.tensor(owner, "a") in graph.tensors]
