"""Applying passes: match, split what no longer is equal, rewrite, check."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import fx

from surgeon import spec
from surgeon.edit import Edit
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph, copied
from surgeon.passes.base import Adapter, Pass, Skip
from surgeon.sites import Site


def owner_of(graph: Graph, step: Pass) -> str:
    """The id of a pass about to be applied: its name, numbered from the second time on."""
    count = sum(done.name == step.name for done in graph.applied)
    return step.name if count == 0 else f"{step.name}_{count + 1}"


def owners(applied: Iterable[Pass]) -> dict[str, Pass]:
    """The ids of the passes of a graph, in order."""
    found: dict[str, Pass] = {}
    for step in applied:
        count = sum(done.name == step.name for done in found.values())
        found[step.name if count == 0 else f"{step.name}_{count + 1}"] = step
    return found


def chosen_sites(graph: Graph, step: Pass) -> tuple[list[Site], list[Skip]]:
    """What a pass would work on, and what it skips."""
    found = step.match(graph)
    return [s for s in found if isinstance(s, Site)], [s for s in found if isinstance(s, Skip)]


def apply(graph: Graph, *steps: Pass, seed: int = 0, tokenizer: Any = None) -> Graph:
    """A new graph with the passes applied in order; the given one is not touched, weights are shared.

    Args:
        graph: the graph to start from.
        steps: the passes.
        seed: of the first values of what they insert.
        tokenizer: of the model, for first values that are made from text.

    Raises:
        UsageError: a pass matches nothing, or is applied twice and does not stack.
        SurgeonError: a pass's own requirement or promise does not hold.
    """
    for step in steps:
        graph = _apply_one(graph, step, seed, tokenizer)
    return graph


def _apply_one(graph: Graph, step: Pass, seed: int, tokenizer: Any) -> Graph:
    if not step.stacks and any(done.name == step.name for done in graph.applied):
        raise UsageError(f"{step.name} is already applied", graph.source, step.hint_twice)
    step = step.fitted(graph)
    step.requires(graph)
    chosen, _ = chosen_sites(graph, step)
    result, owner = graph.copy(), owner_of(graph, step)
    step = step.prepare(result, chosen)
    result.trunk = copied(graph.trunk)[0]
    for part, paths, group in _groups(result, step, chosen):
        for site in group:
            resolved, edit = step.at(site), Edit(result, part, paths, owner, site, seed)
            if isinstance(step, Adapter) and step.reads_weight and edit.below:
                raise UnsupportedError(
                    f"{step.name} reads the weight of a layer that another adapter has changed",
                    f"{site.path}, by {edit.below}",
                    f"apply {step.name} first, or merge the other into the base",
                )
            resolved.rewrite(edit, site)
        for path in paths:
            if path:
                result.layers[path] = part
    step.finish(result, owner)
    step.initialise(result, owner, seed, tokenizer)
    result.applied = (*graph.applied, step)
    spec.check(result, owner)
    step.ensures(result)
    return result


def _groups(graph: Graph, step: Pass, chosen: list[Site]) -> list[tuple[fx.Graph, list[str], list[Site]]]:
    """Layers that share a graph and are rewritten alike, with a fresh copy of it and the sites of the first of them."""
    by_layer: dict[str, list[Site]] = {}
    for site in chosen:
        by_layer.setdefault(site.layer, []).append(site)
    alike: dict[object, tuple[list[str], list[Site]]] = {}
    for layer, found in by_layer.items():
        part = graph.layers[layer] if layer else graph.trunk
        key = (id(part), tuple((site.node, step.at(site)) for site in found))
        alike.setdefault(key, ([], found))[0].append(layer)
    groups = []
    for paths, found in alike.values():
        part = copied(graph.layers[paths[0]])[0] if paths[0] else graph.trunk
        groups.append((part, paths, found))
    return groups


def without_values(graph: Graph) -> Graph:
    """The structure alone."""
    return dataclasses.replace(graph, values={}, inserted={})


def require_node(graph: Graph, kind: str, method: str) -> None:
    """Raise UnsupportedError unless the graph has a site of this kind; it says why not, and what works without."""
    from surgeon.passes import PASSES, find
    from surgeon.sites import sites

    if not sites(graph, kind):
        others = [name for name in PASSES if any(sites(graph, other) for other in find(name).kinds)]
        why = [note for note in graph.notes if note.startswith(f"{kind} captured")]
        raise UnsupportedError(
            f"{method} needs an {kind} node, and {graph.config.model_type} was captured without one",
            "; ".join(why or graph.notes) or graph.source,
            f"methods that work on it: {', '.join(others)}",
        )
