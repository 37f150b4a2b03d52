"""What a work folder holds: which sites were adapted, how far their weights moved, and how big everything is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from surgeon.fold import Fold, folds, normals, stacked, value_of
from surgeon.graph import Graph
from surgeon.options import documented_spec
from surgeon.planning import base_bytes, base_parameters
from surgeon.report_virtual import VirtualSite, virtual_sites
from surgeon.run import owners
from surgeon.sites import sites
from surgeon.strip import without


@dataclass(frozen=True)
class AdaptedSite:
    """One adapted module.

    Attributes:
        path: of the module.
        kind: of the site.
        shape: `[out, in]`.
        methods: ids of the passes, in order.
        rank: sum of the ranks.
        parameters: that were added here and train.
        change: ‖ΔW‖ / ‖W‖ (Frobenius), ΔW what all its adapters together add to the weight W.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    methods: tuple[str, ...]
    rank: int
    parameters: int
    change: float


@dataclass(frozen=True)
class Report:
    """A work folder.

    Attributes:
        folder: where.
        base: the folder of the base model.
        model: its type.
        task: what it is captured for.
        methods: option strings of the passes, in order.
        trainable_parameters: that training changes.
        base_parameters: of the base model.
        site_count: number of adapted sites.
        sites: those whose weights change, in the order of the model.
        virtual: those with virtual tokens.
        base_bytes: of the base on disk, in its dtype.
        files: name → bytes of the files in the folder.
        notes: what capture found worth telling.
    """

    folder: str
    base: str
    model: str
    task: str
    methods: tuple[str, ...]
    trainable_parameters: int
    base_parameters: int
    site_count: int
    sites: tuple[AdaptedSite, ...]
    virtual: tuple[VirtualSite, ...]
    base_bytes: int
    files: dict[str, int]
    notes: tuple[str, ...]


def report(graph: Graph, folder: str | Path, progress: Callable[[str, int, int], None] | None = None) -> Report:
    """Look at an adapted graph with values; reads every adapted weight once.

    Args:
        graph: the graph.
        folder: where it was read from.
        progress: called with a module, the bytes read so far, and those there are.
    """
    by_site: dict[tuple[str, str], list[Fold]] = {}
    position = {site.path: number for number, site in enumerate(sites(graph))}
    for item in sorted(folds(graph), key=lambda item: position[item.site.path]):
        by_site.setdefault((item.site.path, item.site.weight), []).append(item)
    found: list[AdaptedSite] = []
    done, total = 0, sum(4 * graph.tensors[weight].count for _, weight in by_site)
    for (path, weight), group in by_site.items():
        found.append(_adapted(graph, group))
        done += 4 * graph.tensors[weight].count
        if progress is not None:
            progress(path, done, total)
    place, virtual = Path(folder), virtual_sites(graph)
    listed = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else []
    files = {path.relative_to(place).as_posix(): path.stat().st_size for path in listed}
    return Report(
        folder=str(folder),
        base=os.path.normpath(graph.source),
        model=str(graph.config.model_type),
        task=graph.task,
        methods=tuple(documented_spec(step) for step in graph.applied),
        trainable_parameters=sum(spec.count for spec in graph.trainable().values()),
        base_parameters=base_parameters(graph),
        site_count=len(found) + len(virtual),
        sites=tuple(found),
        virtual=virtual,
        base_bytes=base_bytes(graph),
        files=files,
        notes=graph.notes,
    )


def base_graph(graph: Graph) -> Graph:
    """The graph without its adapters."""
    return without(graph, set(owners(graph.applied)))


def _adapted(graph: Graph, found: list[Fold]) -> AdaptedSite:
    site = found[0].site
    costs = [item.step.cost(site) for item in found]
    return AdaptedSite(
        path=site.path,
        kind=site.kind,
        shape=(site.out, site.inp),
        methods=tuple(item.owner for item in found),
        rank=sum(cost.rank for cost in costs),
        parameters=sum(cost.trained for cost in costs),
        change=relative_change(graph, found),
    )


@torch.no_grad()
def relative_change(graph: Graph, found: list[Fold]) -> float:
    """‖ΔW‖ / ‖W‖ of the adapters of one weight; 0 for a weight of zeros that stays."""
    site = found[0].site
    weight = site.matrix(value_of(graph, site.weight).float())

    def bias() -> torch.Tensor | None:
        return value_of(graph, site.bias) if site.bias else None

    made = normals(found, lambda: weight, bias)
    if all(normal.s is None and normal.u is None for normal in made):
        deltas = [delta for normal in made if (delta := normal.delta()) is not None]
        change = sum(deltas, torch.zeros(())).norm().item()
    else:
        change = (stacked(weight, made) - weight).norm().item()
    size = weight.norm().item()
    return change / size if size else (float("inf") if change else 0.0)
