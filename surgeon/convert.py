"""Adapters into LoRA: any method that folds into weights, several adapters combined, or the difference of two models.

What an adapter does to a weight is exact in LoRA's factors where its normal form has only factors (LoRA, DyLoRA,
AdaLoRA, VeRA); where it scales the weight (DoRA, IA³) the change is a whole matrix, and its best approximation of the
rank asked for is taken. Every site's error is reported.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgeon import fold, low_rank, run
from surgeon.bypass import bypass_at
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.low_rank import LowRank
from surgeon.normal import Normal
from surgeon.passes.lora import Lora
from surgeon.replaced import Held
from surgeon.sites import Site, sites
from surgeon.strip import without

SUM, TIES, DARE = "sum", "ties", "dare"


@dataclass(frozen=True)
class SiteError:
    """One site of the result: its rank, and ‖ΔW − ΔW'‖ / ‖ΔW‖, 0 where the conversion is exact."""

    path: str
    rank: int
    error: float


@dataclass(frozen=True)
class Converted:
    """The base with one LoRA that stands for what was given, and what that cost."""

    graph: Graph
    sites: tuple[SiteError, ...]

    @property
    def exact(self) -> bool:
        """Whether nothing was left out."""
        return all(site.error == 0 for site in self.sites)


def to_lora(graph: Graph, *, rank: int = 0, error: float = 0.0) -> Converted:
    """The adapters of one graph as one LoRA.

    Args:
        graph: an adapted graph with values.
        rank: of every site at most; 0: what each needs to be exact, where factors are known.
        error: the lowest rank whose relative error is at most this.

    Raises:
        UsageError: nothing is applied.
        UnsupportedError: something trained that is no change of a weight, or a whole matrix and no rank nor error.
    """
    return combine([graph], [1.0], rank=rank, error=error)


def combine(
    graphs: Sequence[Graph],
    weights: Sequence[float],
    *,
    how: str = SUM,
    density: float = 0.2,
    seed: int = 0,
    rank: int = 0,
    error: float = 0.0,
) -> Converted:
    """Adapters of several graphs over one base as one LoRA: their weighted sum, TIES, or DARE (see `low_rank`).

    Args:
        graphs: adapted graphs over the same base.
        weights: one per graph.
        how: "sum", "ties" or "dare".
        density: share of the entries that TIES and DARE keep.
        seed: of DARE.
        rank: see `to_lora`.
        error: see `to_lora`.

    Raises:
        UsageError: the bases differ, or the options do not fit.
    """
    _check(graphs, weights, how, density)
    base = _base(graphs[0])
    found: dict[str, tuple[Site, list[tuple[float, LowRank | Tensor]]]] = {}
    for graph, weight in zip(graphs, weights, strict=True):
        for path, (site, change) in _changes(graph).items():
            found.setdefault(path, (site, []))[1].append((weight, change))
    changes = {path: _combined(path, parts, how, density, seed) for path, (_, parts) in found.items()}
    return _as_lora(base, changes, rank, error)


def extract(
    base: Graph, tuned: Mapping[str, Tensor], *, targets: str = "all-linear", rank: int = 0, error: float = 0.0
) -> Converted:
    """The difference of two checkpoints of one architecture as a LoRA on the first.

    Args:
        base: the graph of the first, with values.
        tuned: the values of the second, by the names of the graph.
        targets: which modules; what differs elsewhere is an error.
        rank: see `to_lora`.
        error: see `to_lora`.

    Raises:
        UnsupportedError: the checkpoints also differ where no LoRA is put (norms, biases, a head); the first is named.
    """
    chosen, _ = run.chosen_sites(base, Lora(targets=targets, rank=1))
    taken = {site.weight for site in chosen}
    other = [n for n, spec in base.tensors.items() if spec.persistent and n not in taken and not _equal(base, tuned, n)]
    if other:
        what = f"the models also differ in {other[0]}" + (f" and {len(other) - 1} more" if len(other) > 1 else "")
        raise UnsupportedError(what, "outside the targets", "widen --targets, or keep the tuned model as it is")
    changes: dict[str, LowRank | Tensor] = {}
    for site in chosen:
        change = tuned[site.weight].float() - base.values[site.weight].float()
        if bool(change.any()):
            changes[site.path] = site.matrix(change)
    if not changes:
        raise UsageError("the two models are the same", targets, "name the tuned one second")
    return _as_lora(base, changes, rank, error)


def _equal(base: Graph, tuned: Mapping[str, Tensor], name: str) -> bool:
    return name in tuned and torch.equal(base.values[name], tuned[name])


def _check(graphs: Sequence[Graph], weights: Sequence[float], how: str, density: float) -> None:
    if how not in (SUM, TIES, DARE):
        raise UsageError(f"unknown way to combine '{how}'", "--combine", f"{SUM}, {TIES} or {DARE}")
    if not 0 < density <= 1:
        raise UsageError(f"density is {density}", "--density", "a share above 0 and at most 1")
    if len(weights) != len(graphs):
        raise UsageError(f"{len(weights)} weights for {len(graphs)} adapters", "--weights", "one number per adapter")
    for graph in graphs[1:]:
        if graph.source != graphs[0].source and _identity(graph) != _identity(graphs[0]):
            where = f"{graphs[0].source} and {graph.source}"
            raise UsageError("the adapters have different bases", where, "combine adapters of one base")


def _identity(graph: Graph) -> str:
    from surgeon.source import open_source

    return open_source(graph.source, graph.task).checkpoint.fingerprint()


def _base(graph: Graph) -> Graph:
    """The graph without its adapters."""
    if not graph.applied:
        raise UsageError("there is no adapter to convert", graph.source, "give a work folder or a PEFT adapter folder")
    return without(graph, set(run.owners(graph.applied)))


def _changes(graph: Graph) -> dict[str, tuple[Site, LowRank | Tensor]]:
    """Module path → what all adapters of the graph make of its weight, in factors or as a matrix."""
    left = [item.owner for item in fold.rest(graph)]
    whole = [name for name, spec in graph.tensors.items() if spec.trainable and not spec.owner]
    if left or whole:
        what = f"{left[0]} changes no weight" if left else f"{whole[0]} was trained whole"
        raise UnsupportedError(f"{what}, and LoRA cannot hold it", graph.source, "surgeon merge keeps everything")
    groups: dict[str, list[fold.Fold]] = {}
    for item in fold.folds(graph):
        groups.setdefault(item.site.path, []).append(item)
    return {path: (group[0].site, _change(graph, group)) for path, group in groups.items()}


def _change(graph: Graph, group: list[fold.Fold]) -> LowRank | Tensor:
    site = group[0].site

    def weight() -> Tensor:
        return site.matrix(fold.value_of(graph, site.weight).float())

    read = fold.normals(group, weight, lambda: fold.value_of(graph, site.bias) if site.bias else None)
    made = [normal.factored() for normal in read]
    if any(normal.bias is not None for normal in made):
        raise UnsupportedError("the adapter changes a bias, and LoRA cannot hold it", site.path, "merge it instead")
    products = any(normal.product is not None for normal in read)
    wide = products and sum(n.a.shape[-2] for n in made if n.a is not None) > min(site.inp, site.out)
    if all(_factors_alone(normal) for normal in made) and not wide:
        return low_rank.added(
            [
                LowRank(_expanded(n), n.b.float() * (n.scale / n.divisor))
                for n in made
                if n.a is not None and n.b is not None
            ]
        )
    return fold.stacked(weight(), made) - weight()


def _factors_alone(normal: Normal) -> bool:
    return normal.u is None and normal.s is None and normal.a is not None


def _expanded(normal: Normal) -> Tensor:
    assert normal.a is not None
    return normal.a.float().repeat_interleave(normal.group, -1)


def _combined(
    path: str, parts: list[tuple[float, LowRank | Tensor]], how: str, density: float, seed: int
) -> LowRank | Tensor:
    if how == SUM and all(isinstance(change, LowRank) for _, change in parts):
        return low_rank.added([change.scaled(w) for w, change in parts if isinstance(change, LowRank)])
    matrices = [change.matrix() if isinstance(change, LowRank) else change for _, change in parts]
    weights = [weight for weight, _ in parts]
    if how == TIES:
        return low_rank.ties(matrices, weights, density)
    if how == DARE:
        digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return low_rank.dare(matrices, weights, density, generator)
    return torch.stack([weight * matrix for weight, matrix in zip(weights, matrices, strict=True)]).sum(0)


def _as_lora(base: Graph, changes: Mapping[str, LowRank | Tensor], rank: int, error: float) -> Converted:
    """One LoRA of scale 1 over the base, with its own rank at every site."""
    factors, report = {}, []
    by_path = {site.path: site for site in sites(base)}
    for path, change in changes.items():
        if isinstance(change, LowRank) and change.rank == 0:  # AdaLoRA took all of it away
            continue
        if isinstance(change, Tensor) and not (rank or error):
            what = "the change is a whole matrix: no low rank is exact"
            raise UnsupportedError(what, path, "give --rank or --error")
        known = change if isinstance(change, LowRank) else low_rank.factored(change)
        groups = by_path[path].groups  # of a convolution have factors each
        made, lost = low_rank.truncated(known, -(-rank // groups), error)
        factors[path] = made
        report.append(SiteError(path, made.rank * groups, lost))
    if not factors:
        raise UsageError("the adapters change nothing", base.source, "train them first")
    ranks = tuple((f"re:{re.escape(path)}", made.rank * by_path[path].groups) for path, made in factors.items())
    common = max({r for _, r in ranks}, key=[r for _, r in ranks].count)
    odd = tuple((pattern, r) for pattern, r in ranks if r != common)
    step = Lora(
        targets="re:" + "|".join(re.escape(path) for path in factors),
        rank=common,
        alpha=float(common),
        ranks=odd,
        alphas=tuple((pattern, float(r)) for pattern, r in odd),
    )
    graph = run.apply(base, step)
    for path, made in factors.items():
        site = by_path[path]
        pair = bypass_at(site, made.rank * site.groups).of_normal(made.a, made.b)
        for name, tensor in zip("ab", pair, strict=True):
            graph.inserted[site.tensor("lora", name)] = Held(tensor.contiguous())
    return Converted(graph, tuple(report))
