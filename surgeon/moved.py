"""Low-rank adapters whose first values are part of the weight: their pairs in a graph, and both as one for PEFT."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from surgeon import eva
from surgeon.coded import stored_parts
from surgeon.errors import UsageError
from surgeon.first_factors import FirstFactor, FirstPair
from surgeon.graph import Graph
from surgeon.hold import Codes
from surgeon.passes.lora import Lora
from surgeon.passes.quantiser import Quantiser
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
    pairs = step.moves or step.recodes
    for site in _adapted(graph, owner, step):
        at = step.at(site)
        original = functools.partial(graph.values.__getitem__, site.weight)
        quantised = step.init.startswith("loftq")
        rounded = functools.partial(_rounded, graph, site) if quantised else None
        pair = FirstPair(step.init, site, at.rank, at.scale, seed, original, rounded)
        for word in ("a", "b", "a0", "b0") if pairs else ("a", "b"):
            graph.inserted[site.tensor(owner, word)] = FirstFactor(pair, word)
    if step.recodes:
        _code_again(graph, owner, step)


def unfit_for_loftq(graph: Graph, site: Site) -> str:
    """Why there is nothing here that LoftQ could make up for, or ""."""
    if graph.tensors[site.weight].held is None:
        return "its weight is not quantised, and loftq has nothing to make up for: name nf4 before it"
    return "" if stored_parts(graph, site.weight) is None else "its checkpoint has codes alone, and loftq needs weights"


def _quantiser(graph: Graph, site: Site) -> Quantiser:
    held = graph.tensors[site.weight].held
    step = None if held is None else owners(graph.applied)[held.owner]
    if not isinstance(step, Quantiser):
        raise UsageError("the weight is not quantised", site.path, "apply nf4 or intq first")
    return step


def _rounded(graph: Graph, site: Site, matrix: torch.Tensor) -> torch.Tensor:
    return _quantiser(graph, site).decode(_codes(graph, site, matrix), site)


def _codes(graph: Graph, site: Site, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """In the dtype of the weight, as its own codes are made."""
    return _quantiser(graph, site).encode(matrix.to(graph.values[site.weight].dtype))


def _code_again(graph: Graph, owner: str, step: Lora) -> None:
    """The codes of the weights are those of what the pair of the round before leaves over."""

    def make(name: str) -> dict[str, torch.Tensor]:
        site = by_weight[name]
        a, b = (graph.inserted[site.tensor(owner, word)]() for word in ("a0", "b0"))
        return _codes(graph, site, site.matrix(graph.values[name].float()) - b @ a)

    by_weight = {site.weight: site for site in _adapted(graph, owner, step)}
    codes = Codes(make)
    for name in by_weight:
        held = graph.tensors[name].held
        for part, full in {} if held is None else held.parts.items():
            graph.inserted[full] = functools.partial(codes, name, part)


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
