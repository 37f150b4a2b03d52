"""A graph in its final form: what only training needed is gone, and what does not fold is constant columns and rows."""

from __future__ import annotations

from collections.abc import Callable

from surgeon import fold, run
from surgeon.graph import Graph
from surgeon.passes.base import Adapter
from surgeon.replaced import Held
from surgeon.sites import EMBEDDING
from surgeon.strip import without


def finalise(graph: Graph, merge: Callable[[Graph], Graph] = fold.fold) -> Graph:
    """The graph with what folds folded in, and the rest as constant columns and rows; tensors of the base are kept.

    `merge` is how adapters fold, if there are any: into the weights, unless it is something else.
    """
    training = {owner for owner, step in run.owners(graph.applied).items() if step.training_only}
    graph = without(graph, training) if training else graph
    folded = merge(graph) if fold.folds(graph) else graph
    left = fold.rest(folded)
    names = {item.owner for item in left}
    steps = {owner: step for owner, step in run.owners(folded.applied).items() if owner in names}
    final = {owner: step.final() for owner, step in steps.items() if isinstance(step, Adapter)}
    if all(final[owner] == step for owner, step in steps.items()):
        return folded
    result = run.apply(without(folded, names), *final.values())
    result.inserted.update({name: folded.inserted[name] for name in result.inserted if name in folded.inserted})
    for item in left:
        form = item.rows() if item.site.kind == EMBEDDING else item.columns()
        for name, value in final[item.owner].params(form, item.site).items():
            result.inserted[item.site.tensor(item.owner, name)] = Held(value)
    return result
