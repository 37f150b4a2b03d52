"""Tensors of the base that train themselves beside an adapter: whole modules (a new head) and biases.

Such a tensor keeps its name, becomes trainable, and has its value in `Graph.inserted`, which comes before the base's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.select import ALL_EMBEDDINGS, ALL_NORMS, check_words, matches, words
from surgeon.sites import EMBEDDING, sites

if TYPE_CHECKING:
    from surgeon.passes.base import Adapter


@dataclass(frozen=True)
class FromBase:
    """The base's own value of a tensor, as a copy that may be written to."""

    values: Mapping[str, torch.Tensor]
    name: str

    def __call__(self) -> torch.Tensor:
        """Read it."""
        return self.values[self.name].detach().clone()


@dataclass(frozen=True)
class Held:
    """A value in memory, as a copy that may be written to."""

    tensor: torch.Tensor

    def __call__(self) -> torch.Tensor:
        """Copy it."""
        return self.tensor.clone()


def module_paths(graph: Graph) -> list[str]:
    """Every module of the base model that holds a tensor, itself or below it."""
    found: dict[str, None] = {}
    for name in (*(n for n, spec in graph.tensors.items() if not spec.owner), *graph.ties):
        parts = name.split(".")[:-1]
        found.update((".".join(parts[: count + 1]), None) for count in range(len(parts)))
    return list(found)


def modules(graph: Graph, pattern: str) -> list[str]:
    """The outermost modules of the base that a pattern names.

    Raises:
        UsageError: a word of it matches nothing.
    """
    if not pattern:
        return []
    paths = module_paths(graph)
    check_words(pattern, paths)
    found = [path for path in paths if matches(pattern, path)]
    return [path for path in found if not any(path.startswith(f"{outer}.") for outer in found)]


def spelled(graph: Graph, pattern: str) -> str:
    """A pattern of modules with `all-embeddings` and `all-norms` written out as the modules of this graph.

    Embeddings are the tables that are looked up; norms are the modules that hold nothing but vectors.
    """
    chosen = words(pattern)
    if ALL_EMBEDDINGS not in chosen and ALL_NORMS not in chosen:
        return pattern
    found: list[str] = []
    for word in chosen:
        if word == ALL_EMBEDDINGS:
            found += _short(graph, [site.weight.removesuffix(".weight") for site in sites(graph, EMBEDDING)])
        else:
            found += _short(graph, _norms(graph)) if word == ALL_NORMS else [word]
    return ",".join(dict.fromkeys(found))


def _norms(graph: Graph) -> list[str]:
    own: dict[str, list[str]] = {}
    for name, spec in graph.tensors.items():
        if not spec.owner and spec.parameter:
            module, _, leaf = name.rpartition(".")
            own.setdefault(module, []).append(leaf if len(spec.shape) == 1 else "")
    outer = {path.rpartition(".")[0] for path in module_paths(graph)}
    return [path for path, leaves in own.items() if {"weight"} <= {*leaves} <= {"weight", "bias"} and path not in outer]


def _short(graph: Graph, paths: list[str]) -> list[str]:
    """Last names that name exactly these modules, else the paths."""
    leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    named = {path for path in module_paths(graph) if path.rpartition(".")[2] in leaves}
    return leaves if named == set(paths) else list(dict.fromkeys(paths))


def inside(pattern: str, path: str) -> bool:
    """Whether a module, or one that holds it, is named by a pattern."""
    parts = path.split(".")
    return bool(pattern) and any(matches(pattern, ".".join(parts[: count + 1])) for count in range(len(parts)))


def names(graph: Graph, owner: str, step: Adapter) -> list[str]:
    """The base's tensors that train with an adapter applied to `graph`, by its `modules_to_save` and `bias`."""
    prefixes = tuple(f"{path}." for path in modules(graph, step.modules_to_save))
    base = [name for name, spec in graph.tensors.items() if not spec.owner and spec.persistent]
    found = [name for name in (*base, *graph.ties) if prefixes and name.startswith(prefixes)]
    if step.bias == "all":
        found += [name for name in base if name.endswith(".bias") and name not in found]
    elif step.bias == "sites":
        marked = {name.partition(f".{owner}.")[0] for name, spec in graph.tensors.items() if spec.owner == owner}
        found += [name for name in base if name.endswith(".bias") and name.removesuffix(".bias") in marked]
    return found


def train(graph: Graph, chosen: Iterable[str]) -> None:
    """Make tensors of the base trainable, in place. One of a tied pair gets a value of its own: the pair is untied.

    Raises:
        UsageError: a tensor is not floating point.
    """
    for name in list(chosen):
        for alias, stored in list(graph.ties.items()):
            if name in (alias, stored):
                graph.tensors[alias] = graph.tensors[stored]
                graph.inserted.setdefault(alias, FromBase(graph.values, stored))
                del graph.ties[alias]
        spec = graph.tensors[name]
        if spec.dtype is not None and not spec.dtype.is_floating_point:
            if spec.parameter:
                raise UsageError(f"{name} is {spec.dtype} and cannot train", "--modules-to-save", "leave it out")
            continue
        graph.tensors[name] = dataclasses.replace(spec, trainable=spec.parameter)
        graph.inserted.setdefault(name, FromBase(graph.values, name))
    _check_apart(graph)


def _check_apart(graph: Graph) -> None:
    """Raise UsageError for a weight that an adapter changes and that trains itself, by another pass's wish."""
    owned = ((name, spec.owner) for name, spec in graph.tensors.items() if spec.owner)
    adapted = {name.partition(f".{owner}.")[0] for name, owner in owned}
    for name, spec in graph.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and spec.trainable and not spec.owner and module in adapted:
            raise UsageError(
                f"{module} has an adapter, and its weight trains whole too",
                "--modules-to-save",
                "one of the two: --exclude it",
            )
