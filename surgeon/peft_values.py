"""Tensors of an adapter's file put into a graph, strictly: what is missing, unexpected or of another shape is named."""

from __future__ import annotations

from pathlib import Path

import torch

from surgeon import replaced
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph


def put(graph: Graph, name: str, tensor: torch.Tensor, key: str, where: Path) -> None:
    """Give a tensor of the graph a value; raises UsageError for another shape."""
    check_shape(key, tuple(tensor.shape), graph.tensors[name].shape, where)
    graph.inserted[name] = replaced.Held(tensor)


def check_shape(key: str, found: tuple[int, ...], wanted: tuple[int, ...], where: Path) -> None:
    """Raise UsageError for a tensor that does not fit its place."""
    if found != wanted:
        raise UsageError(
            f"{key} is {list(found)} in the adapter, and its place in the base is {list(wanted)}", str(where),
            "the adapter is for another base or another rank: name its own base with --base",
        )  # fmt: skip


def put_all(graph: Graph, names: dict[str, str], tensors: dict[str, torch.Tensor], prefix: str, where: Path) -> None:
    """Put tensors by their keys into a graph, in place; none may be missing, none left over.

    Args:
        graph: the graph.
        names: full name of a tensor of the graph → its key.
        tensors: what the file holds, by key.
        prefix: what stands before the names of the base's own tensors in keys.
        where: the file.

    Raises:
        UsageError: a key is missing or unexpected, or a tensor has another shape than its place; they are named.
    """
    left = dict(tensors)
    _drop_tables(graph, left, set(names.values()), prefix, where)
    _complain([key for key in names.values() if key not in left], "missing", where)
    for name, key in names.items():
        put(graph, name, left.pop(key), key, where)
    _complain(list(left), "unexpected", where)


def take(tensors: dict[str, torch.Tensor], key: str, where: Path) -> torch.Tensor:
    """The tensor of a key, out of those that are left; raises UsageError if it is missing."""
    _complain([] if key in tensors else [key], "missing", where)
    return tensors.pop(key)


def _drop_tables(graph: Graph, left: dict[str, torch.Tensor], wanted: set[str], prefix: str, where: Path) -> None:
    """PEFT may store the base's whole embedding or head beside an adapter; the base has it.

    Raises:
        UnsupportedError: it is another table: resized, or trained.
    """
    for key in [key for key in left if key not in wanted]:
        name = key.removeprefix(prefix).replace(".base_layer.", ".")
        if graph.resolve(name) not in graph.tensors or name in graph.inserted:
            continue
        table, own = left.pop(key), graph.values[graph.resolve(name)]
        if tuple(table.shape) != tuple(own.shape):
            what = f"{key} is {list(table.shape)}, and the base's own is {list(own.shape)}: it was resized"
        elif not torch.equal(table.to(own.dtype), own):
            what = f"{key} is not the base's own {name}"
        else:
            continue
        raise UnsupportedError(what, str(where), "save the base with this table in it, and name that with --base")


def _complain(found: list[str], kind: str, where: Path) -> None:
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UsageError(
            f"{kind} adapter key{'s' * (len(found) > 1)}: {', '.join(sorted(found)[:3])}{more}", str(where),
            "the adapter is for another base, or the file was cut: name its own base with --base, or save it again",
        )  # fmt: skip
