"""What a merge leaves over: adapters that no weight can hold, as a work folder beside the merged weights.

`merged/adapter/` names `merged/` as its base, by a relative path too, so that the two move together. Opening the merged
folder with surgeon puts the rest back on.
"""

from __future__ import annotations

from pathlib import Path

from surgeon import fold, run, store
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph

FOLDER = store.REST


def left_over(graph: Graph) -> tuple[str, ...]:
    """The ids of the adapters that do not fold, in the order they were applied."""
    return tuple(dict.fromkeys(item.owner for item in fold.rest(graph)))


def require_none(graph: Graph, out: str | Path) -> None:
    """Raise UnsupportedError if an adapter would be left over."""
    if names := left_over(graph):
        what = f"{', '.join(names)} cannot be folded into weights: virtual tokens stay an adapter"
        raise UnsupportedError(what, str(out), "without --strict it is written beside the merged weights, in adapter/")


def put_back(graph: Graph, merged: Graph) -> Graph:
    """A graph of the merged weights with the adapters of `graph` that did not fold, and their trained values."""
    names = left_over(graph)
    steps = [step for owner, step in run.owners(graph.applied).items() if owner in names]
    result = run.apply(merged, *steps)
    for name in result.inserted:
        result.inserted[name] = graph.inserted[name]
    return result


def write(adapted: Graph, folder: Path, final: Path) -> None:
    """Write the rest into the merged folder while it still has its temporary name.

    Args:
        adapted: the merged graph with the rest on it, opened from `folder`.
        folder: the merged folder.
        final: the name it will have.
    """
    store.save(adapted, folder / FOLDER, base=final)
