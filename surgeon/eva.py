"""First values of LoRA from data: directions of a layer's inputs, ranks where they explain most (EVA, Paischer 2024).

    X ≈ U Σ Vᵀ,  a = the first rows of Vᵀ,  share of direction i: σᵢ² / ‖X‖²

over the inputs X `[tokens, in]` that a layer sees for a file of samples. b is 0, so that the first step sees the base.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx

from surgeon import module, numbering, run
from surgeon.errors import UsageError
from surgeon.first_factors import randomised_svd
from surgeon.graph import Graph
from surgeon.model import shifted_right
from surgeon.passes.base import CONV1D, LINEAR, Pass
from surgeon.replaced import Held
from surgeon.select import by_pattern
from surgeon.sites import Site, argument_of, input_position

if TYPE_CHECKING:
    from surgeon.edit import Edit
    from surgeon.passes.lora import Lora

FIRST = ".first"
"""Behind the name of a: the values it is to begin with, between `prepare` and `initialise`."""
SAMPLES, LENGTH, EXACT = 4, 512, 1024
"""Samples of a batch, their longest, and the size up to which a decomposition is not randomised."""
SETTLED = 0.99
"""Cosine between a direction before and after a batch from which on it counts as found, as in the authors' code."""


@dataclass(frozen=True)
class ReadInputs(Pass):
    """The inputs of linears as outputs `<path>.x` of the model."""

    name: ClassVar[str] = "read_inputs"
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D)
    paths: tuple[str, ...] = ()

    def match(self, graph: Graph) -> list[Any]:
        """The sites named."""
        return [site for site in super().match(graph) if isinstance(site, Site) and site.path in self.paths]

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x → output."""
        edit.model_output(edit.x, {path: f"{path}{site.path[len(site.layer) :]}.x" for path in edit.paths})


@dataclass
class Directions:
    """The first right singular vectors of rows that come in batches.

    Four times as many as are wanted are carried from batch to batch; what is not among them is forgotten.

    Attributes:
        count: how many are wanted.
        vectors: `[.., in]`, largest singular values first.
        values: σ of each.
        total: ‖X‖².
        settled: whether the last batch has left those that are wanted where they were.
    """

    count: int
    vectors: Tensor
    values: Tensor
    total: float = 0.0
    settled: bool = False

    @classmethod
    def of(cls, count: int, size: int) -> Directions:
        """None yet, of rows of this size."""
        return cls(count, torch.zeros(0, size), torch.zeros(0))

    @property
    def shares(self) -> list[float]:
        """σᵢ² / ‖X‖²."""
        return (self.values.double().square() / (self.total or 1.0)).tolist()

    def add(self, rows: Tensor) -> None:
        """Take a batch `[tokens, in]` in."""
        rows = rows.float()
        self.total += float(rows.double().square().sum())
        stacked = torch.cat([self.values[:, None] * self.vectors, rows])
        if min(stacked.shape) <= EXACT:
            _, values, vectors = torch.linalg.svd(stacked, full_matrices=False)
        else:
            _, values, vectors = randomised_svd(stacked, 4 * self.count, 2, torch.Generator().manual_seed(0))
        before, kept = self.vectors[: self.count], 4 * self.count
        self.vectors, self.values = vectors[:kept], values[:kept]
        if len(before) == self.count:
            self.settled = bool(((before * vectors[: self.count]).sum(1).abs() >= SETTLED).all())


def prepared(graph: Graph, step: Lora, chosen: list[Site]) -> Lora:
    """The pass with the ranks that its data asks for; first values of a are put beside the graph for `place`.

    Without weights (a plan of a config alone) the ranks stay what they are.

    Raises:
        UsageError: the file cannot be read, the model has no tokenizer, or there are fewer tokens than directions.
    """
    if not graph.values:
        return step
    file = Path(step.init.partition(":")[2])
    limits = {s.path: min(round(step.rho * step.rank_at(s.path)), s.inp, s.out) for s in chosen}
    found = directions(graph, chosen, limits, batches(graph, file))
    short = next((path for path in limits if len(found[path].vectors) < limits[path]), None)
    if short is not None:
        what = f"the data has {len(found[short].vectors)} tokens, and {limits[short]} directions are wanted"
        raise UsageError(what, str(file), "more samples, or a lower --rank or --rho")
    budget = sum(step.rank_at(site.path) for site in chosen)
    ranks = distributed({path: one.shares[: limits[path]] for path, one in found.items()}, budget)
    owner = run.owner_of(graph, step)
    for site in chosen:
        vectors = found[site.path].vectors[: ranks[site.path]].clone()
        graph.inserted[site.tensor(owner, "a") + FIRST] = Held(vectors)
    return dataclasses.replace(step, init="eva", ranks=by_pattern(ranks), alphas=by_pattern(_alphas(step, ranks)))


def place(graph: Graph) -> None:
    """The values that `prepared` has found in their places; without them (a work folder that is read) nothing."""
    for name in [name for name in graph.inserted if name.endswith(FIRST)]:
        graph.inserted[name.removesuffix(FIRST)] = graph.inserted.pop(name)


def _alphas(step: Lora, ranks: Mapping[str, int]) -> dict[str, float]:
    """Those that keep every site's scale, whatever its rank becomes."""
    power = 0.5 if step.rslora else 1.0
    return {path: step.alpha_at(path) * (rank / step.rank_at(path)) ** power for path, rank in ranks.items()}


def distributed(shares: Mapping[str, list[float]], budget: int) -> dict[str, int]:
    """How many directions each site gets, one at least: those with the largest shares of all, `budget` together."""
    ranks = dict.fromkeys(shares, 1)
    rest = sorted(((share, path) for path, own in shares.items() for share in own[1:]), key=lambda pair: -pair[0])
    for _, path in rest[: budget - len(ranks)]:
        ranks[path] += 1
    return ranks


def directions(
    graph: Graph, chosen: list[Site], counts: Mapping[str, int], data: Iterable[Mapping[str, Tensor]]
) -> dict[str, Directions]:
    """The directions of the inputs of sites, by path, until all have settled; sites that read one input share them."""
    groups: dict[tuple[str, str], list[Site]] = {}
    for site in chosen:
        groups.setdefault((site.layer, _input(graph, site).name), []).append(site)
    shared = {group[0].path: group for group in groups.values()}
    known = {
        path: Directions.of(max(counts[site.path] for site in group), group[0].inp) for path, group in shared.items()
    }
    reading = run.apply(graph, ReadInputs(tuple(shared)))
    model = module.load(reading, dtype=torch.float32)
    for batch in data:
        with torch.no_grad():
            results = dict(zip(reading.outputs, model(*inputs_of(reading, batch)), strict=True))
        for path, one in known.items():
            one.add(rows_of(results[f"{path}.x"], batch["attention_mask"]))
        if all(one.settled for one in known.values()):
            break
    return {site.path: known[path] for path, group in shared.items() for site in group}


def batches(graph: Graph, file: Path, size: int = SAMPLES, length: int = LENGTH) -> Iterator[dict[str, Tensor]]:
    """The samples of a file, `length` tokens of each at most, as batches of `size` for a model."""
    from surgeon import api
    from surgeon.samples import collator_for, samples_for

    tokenizer = api.tokenizer_of(graph.source)
    if tokenizer is None:
        what = "the model has no tokenizer to read data with"
        raise UsageError(what, graph.source or str(file), "do without the file")
    samples = samples_for(SimpleNamespace(graph=graph, config=graph.config), tokenizer, file, length)
    collate: Any = collator_for(samples, tokenizer, graph.config)
    for first in range(0, len(samples), size):
        yield collate([samples[index] for index in range(first, min(first + size, len(samples)))])


def _input(graph: Graph, site: Site) -> fx.Node:
    part = graph.layers[site.layer] if site.layer else graph.trunk
    node = next(node for node in part.nodes if node.name == site.node)
    return argument_of(node, input_position(node))


def inputs_of(graph: Graph, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The inputs of a model in order, as they are where a user gives none."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    given = {"position_ids": numbering.default(graph, mask, ids), "token_type_ids": torch.zeros_like(ids), **batch}
    if "decoder_input_ids" in graph.inputs:
        given["decoder_input_ids"] = shifted_right(batch["labels"], graph.config)
        given["decoder_attention_mask"] = torch.ones_like(given["decoder_input_ids"])
    return [given[name] for name in graph.inputs]


def rows_of(x: Tensor, mask: Tensor) -> Tensor:
    """Inputs `[.., in]` as rows, without those of padding."""
    rows = x.flatten(0, -2)
    return rows[mask.flatten().bool()] if len(rows) == mask.numel() else rows
