"""What a method would cost on a model: `match` without `rewrite`, from `config.json` alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from surgeon import context, replaced
from surgeon.errors import UsageError
from surgeon.flops import Flops, TextFlops, flops_of, text_flops
from surgeon.graph import Graph, Holding
from surgeon.passes.base import Adapter, Cost, Pass, Skip
from surgeon.run import chosen_sites, owner_of
from surgeon.sites import Site
from surgeon.source import Source, open_graph, open_source

_ADAPTER_BYTES = 4  # what passes insert is fp32
_ADAMW_BYTES = 8  # two fp32 moments per trained parameter


@dataclass(frozen=True)
class PlannedSite:
    """One place a method would change.

    Attributes:
        path: of the module.
        kind: of the site, see `surgeon.sites`.
        shape: `[out, in]`; `[out, vocab]` for an embedding.
        method: id of the pass.
        rank: of the bypass; 0 where there is none.
        trainable_parameters: that it adds here.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    method: str
    rank: int
    trainable_parameters: int


@dataclass(frozen=True)
class Bytes:
    """Sizes in bytes.

    Attributes:
        base: the base model on disk, in its own dtype.
        quantised: the same with its weights in codes (`surgeon quantise`); as `base` where none are.
        memory: the base model in memory: where a method holds weights in codes, those.
        adapter: what the methods store, in fp32.
        gradients: 4 per trained parameter.
        optimizer: AdamW's two moments, 8 per trained parameter.
        training: memory, 4 per number that the methods hold, gradients and optimizer; activations come on top.
    """

    base: int
    quantised: int
    memory: int
    adapter: int
    gradients: int
    optimizer: int
    training: int


@dataclass(frozen=True)
class Plan:
    """The cost of applying methods to a model.

    Attributes:
        model: type of the model.
        task: what it is captured for.
        method: names of the methods, joined by " + ".
        methods: their option strings, in order.
        trainable_parameters: that training changes: what the methods add, and tensors of the base they train.
        stored_parameters: numbers in the adapter's file.
        frozen_parameters: numbers the methods hold in memory and do not train (VeRA's A and B).
        base_parameters: of the base model, tied ones once.
        site_count: number of sites.
        sites: the sites, method by method.
        skipped: sites that were asked for and cannot be adapted, with the reasons.
        bytes: sizes on disk and in training.
        flops_per_token: work per token.
        flops_per_text: work on a text as long as the context; None for a model without a limit.
        notes: what capture found worth telling.
    """

    model: str
    task: str
    method: str
    methods: tuple[str, ...]
    trainable_parameters: int
    stored_parameters: int
    frozen_parameters: int
    base_parameters: int
    site_count: int
    sites: tuple[PlannedSite, ...]
    skipped: tuple[Skip, ...]
    bytes: Bytes
    flops_per_token: Flops
    flops_per_text: TextFlops | None
    notes: tuple[str, ...]


def plan(model: Graph | Source | PretrainedConfig | str | Path, *passes: Pass, task: str | None = None) -> Plan:
    """What the passes, applied in order, would add to a model.

    Args:
        model: a graph, an open source, a config, or a folder or hub id, of which the config alone is read.
        passes: the methods; none gives the base model's own numbers.
        task: see `surgeon.tasks`; read off the config if not given.

    Raises:
        UsageError: a target matches nothing, or an option does not fit the model.
    """
    graph = _graph(model, task)
    planned: list[PlannedSite] = []
    skipped: list[Skip] = []
    costs: list[Cost] = []
    spans: dict[str, int] = {}
    done = graph.copy()
    for step in passes:
        if not step.stacks and any(before.name == step.name for before in done.applied):
            raise UsageError(f"{step.name} is already applied", graph.source, step.hint_twice)
        step = step.fitted(done)
        step.requires(done)
        chosen, left_out = chosen_sites(done, step)
        owner, ready = owner_of(done, step), step.prepare(done, chosen)
        modules, again = _costs(ready, chosen)
        _hold(done, owner, modules)
        spans.update({site.path: cost.span for site, cost in modules if cost.span})
        planned += [_planned(site, owner, cost) for site, cost in modules]
        skipped += left_out
        costs += [*(cost for _, cost in modules), *again, ready.shared_cost(), _retrained(done, ready, chosen)]
        done.applied = (*done.applied, step)
    return _summary(graph, passes, planned, skipped, costs, spans)


def _graph(model: Graph | Source | PretrainedConfig | str | Path, task: str | None) -> Graph:
    if isinstance(model, Graph):
        return model
    if isinstance(model, PretrainedConfig):
        from surgeon.capture import capture_config

        return capture_config(model, task)
    return open_graph(model if isinstance(model, Source) else open_source(model, task, weights=False), values=False)


def _costs(step: Pass, chosen: list[Site]) -> tuple[list[tuple[Site, Cost]], list[Cost]]:
    """What a pass adds at every module, and the work of modules that are called once more (DeBERTa's queries)."""
    modules, calls = dict[str, tuple[Site, Cost]](), list[Cost]()
    for site in chosen:
        cost = step.at(site).cost(site)
        if site.path in modules:
            calls.append(Cost(flops=cost.flops))
        else:
            modules[site.path] = site, cost
    return list(modules.values()), calls


def _hold(graph: Graph, owner: str, modules: list[tuple[Site, Cost]]) -> None:
    """The weights that codes stand for, for those passes that come later and need to know."""
    for site, cost in modules:
        if cost.freed:
            held = Holding(owner, {}, lambda _: torch.empty(0))
            graph.tensors[site.weight] = dataclasses.replace(graph.tensors[site.weight], held=held)


def _planned(site: Site, owner: str, cost: Cost) -> PlannedSite:
    return PlannedSite(site.path, site.kind, (site.out, site.inp), owner, cost.rank, cost.trained)


def _retrained(graph: Graph, step: Pass, chosen: list[Site]) -> Cost:
    """The base's own tensors that train with an adapter; they become trainable in `graph`, so none counts twice."""
    if not isinstance(step, Adapter):
        return Cost()
    on_sites = step.bias == "sites"
    names = replaced.names(graph, "", dataclasses.replace(step, bias="none") if on_sites else step)
    names += [site.bias for site in chosen if on_sites and site.bias and site.bias not in names]
    before = sum(spec.count for spec in graph.trainable().values())
    replaced.train(graph, names)
    count = sum(spec.count for spec in graph.trainable().values()) - before
    return Cost(trained=count, stored=count)


def _summary(
    graph: Graph,
    passes: tuple[Pass, ...],
    planned: list[PlannedSite],
    skipped: list[Skip],
    costs: list[Cost],
    spans: Mapping[str, int],
) -> Plan:
    trained, stored = sum(cost.trained for cost in costs), sum(cost.stored for cost in costs)
    frozen = sum(cost.frozen for cost in costs)
    flops = flops_of(graph, trained, sum(cost.flops for cost in costs))
    length = graph.context or context.limit(graph.config)
    return Plan(
        model=str(graph.config.model_type),
        task=graph.task,
        method=" + ".join(step.name for step in passes),
        methods=tuple(step.spec() for step in passes),
        trainable_parameters=trained,
        stored_parameters=stored,
        frozen_parameters=frozen,
        base_parameters=base_parameters(graph),
        site_count=len(planned),
        sites=tuple(planned),
        skipped=tuple(skipped),
        bytes=_bytes(graph, trained, frozen, stored, costs),
        flops_per_token=flops,
        flops_per_text=text_flops(graph, length, flops.forward, spans) if length else None,
        notes=graph.notes,
    )


def base_parameters(graph: Graph) -> int:
    """The base model's parameters; a tied one counts once."""
    return sum(spec.count for spec in graph.tensors.values() if spec.parameter and not spec.owner)


def base_bytes(graph: Graph) -> int:
    """What the base model's parameters and stored buffers take in the dtype its config names, else fp32."""
    width = _width(graph)
    kept = [spec for spec in graph.tensors.values() if spec.persistent and not spec.owner]
    return sum(spec.count * (spec.dtype.itemsize if spec.dtype else width) for spec in kept)


def _width(graph: Graph) -> int:
    """Bytes per parameter of the base."""
    dtype = getattr(graph.config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize


def _bytes(graph: Graph, trained: int, frozen: int, stored: int, costs: list[Cost]) -> Bytes:
    base, inserted = base_bytes(graph), _ADAPTER_BYTES * (trained + frozen)
    memory = base + sum(cost.held - _width(graph) * cost.freed for cost in costs)
    quantised = base + sum(cost.saved - _width(graph) * cost.freed for cost in costs)
    gradients, optimizer = _ADAPTER_BYTES * trained, _ADAMW_BYTES * trained
    training = memory + inserted + gradients + optimizer
    return Bytes(base, quantised, memory, _ADAPTER_BYTES * stored, gradients, optimizer, training)
