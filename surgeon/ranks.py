"""A trained adapter at a lower rank, where its method trains every rank up to its own (DyLoRA)."""

from __future__ import annotations

import dataclasses

from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.module import GraphModule
from surgeon.passes.base import Adapter
from surgeon.replaced import Held
from surgeon.run import owners


def highest_rank(graph: Graph) -> int:
    """The highest rank of the adapters that have every lower one.

    Raises:
        UsageError: none of them has.
    """
    found = [step.any_rank for step in graph.applied if isinstance(step, Adapter) and step.any_rank]
    if not found:
        names = ", ".join(step.name for step in graph.applied) or "none"
        what = "no adapter here was trained at every rank"
        raise UsageError(what, f"applied: {names}", "train one: surgeon apply --method dylora")
    return max(found)


def at_rank(graph: Graph, rank: int) -> Graph:
    """The same graph with those adapters at this rank (or at their own, where it is lower); others stay.

    Raises:
        UsageError: no adapter has lower ranks, or the rank is above the highest, or below 1.
    """
    if not 1 <= rank <= highest_rank(graph):
        raise UsageError(
            f"the adapter has no rank {rank}", "--rank", f"1 to {highest_rank(graph)}, where it was trained"
        )
    result = dataclasses.replace(graph, inserted=dict(graph.inserted))
    for owner, step in owners(graph.applied).items():
        if isinstance(step, Adapter) and step.any_rank:
            for name, value in step.active_at(min(rank, step.any_rank)).items():
                result.inserted[f"{owner}.{name}"] = Held(value)
    return result


def set_rank(model: GraphModule, rank: int) -> None:
    """Put a loaded model at a rank, in place. Raises UsageError as `at_rank` does."""
    chosen = at_rank(model.graph, rank)
    for name, value in chosen.inserted.items():
        if value is not model.graph.inserted[name]:
            buffer = model.get_buffer(name)
            buffer.copy_(value())
