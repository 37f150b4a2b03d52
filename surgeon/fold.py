"""Folding trained adapters into the weights they stand beside: the first back end of the normal form.

`folds` lists what is adapted where, `fold` takes the adapters' nodes out of the graph and puts merged weights behind
the same names, lazily. Both know only `Normal`s.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.graph import Graph, tag
from surgeon.hold import held_value, holders, is_held
from surgeon.normal import Base, Columns, Normal
from surgeon.passes.base import Adapter
from surgeon.run import owners
from surgeon.sites import ATTENTION, EMBEDDING, Site, sites
from surgeon.strip import without


@dataclass(frozen=True)
class Fold:
    """One adapter at one site.

    Attributes:
        site: where.
        owner: id of the pass that put it there.
        step: that pass, with its options resolved for the site.
        params: its tensors by the names given to `edit.param` and `edit.shared`.
    """

    site: Site
    owner: str
    step: Adapter
    params: Mapping[str, Callable[[], torch.Tensor]]

    def normal(self, base: Base) -> Normal:
        """The normal form; `base` is the layer as the adapters below this one leave it.

        Raises:
            SurgeonError: it changes the bias, and its pass had not said so.
            UnsupportedError: it needs a bias, and the layer has none to hold it.
        """
        normal = self.step.normal(self.tensors(), self.site, base)
        if normal.bias is not None and not self.step.changes_bias:
            raise SurgeonError(f"{self.step.name} changes a bias and does not say so", self.site.path)
        if normal.bias is not None and not self.site.bias:
            raise UnsupportedError(f"{self.step.name} needs a bias, and the layer has none to hold it", self.site.path)
        return normal

    def columns(self) -> Columns:
        """The learned K/V columns, for an attention."""
        return self.step.columns(self.tensors(), self.site)

    def rows(self) -> torch.Tensor:
        """The learned rows `[p, hidden]`, for an embedding."""
        return self.step.rows(self.tensors(), self.site)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors, read."""
        return {name: read() for name, read in self.params.items()}


def folds(graph: Graph) -> list[Fold]:
    """Every adapter that can fold into a weight, in the order they were applied, layer by layer."""
    return [item for item in _adapters(graph) if item.step.folds and item.site.weight]


def rest(graph: Graph) -> list[Fold]:
    """Every adapter that no weight can hold: columns at attentions, rows at embeddings. A merge leaves them."""
    return [item for item in _adapters(graph) if not (item.step.folds and item.site.weight)]


def columns(graph: Graph) -> list[Fold]:
    """Those that add K/V columns to an attention."""
    return [item for item in rest(graph) if item.site.kind == ATTENTION]


def rows(graph: Graph) -> list[Fold]:
    """Those that add rows before the tokens of an embedding."""
    return [item for item in rest(graph) if item.site.kind == EMBEDDING]


Place = tuple[Site, str, Adapter]
_places: weakref.WeakKeyDictionary[fx.Graph, tuple[object, list[Place]]] = weakref.WeakKeyDictionary()


def _adapters(graph: Graph) -> list[Fold]:
    tensors: dict[str, dict[str, Callable[[], torch.Tensor]]] = {}
    for name, read in graph.inserted.items():
        place, _, leaf = name.rpartition(".")
        tensors.setdefault(place, {})[leaf] = read
    return [
        Fold(site, owner, step, {**tensors.get(owner, {}), **tensors.get(site.tensor(owner, "").removesuffix("."), {})})
        for site, owner, step in _where(graph)
    ]


def _where(graph: Graph) -> list[Place]:
    """Site, pass id and pass of every adapter; found once for graphs that differ in their tensors' values alone."""
    layers, counts = tuple(graph.layers.values()), [len(part.nodes) for part in (graph.trunk, *graph.layers.values())]
    key = (layers, counts, graph.applied, graph.ties)
    known = _places.get(graph.trunk)
    if known is None or known[0] != key:
        known = ((*key[:3], dict(graph.ties)), _search(graph))
        _places[graph.trunk] = known
    return known[1]


def _search(graph: Graph) -> list[Place]:
    passes = {owner: step for owner, step in owners(graph.applied).items() if isinstance(step, Adapter)}
    at = {(site.layer, site.node): site for site in sites(graph)}
    found: dict[tuple[str, str], Place] = {}
    for part, prefixes in graph.parts():
        for node in part.nodes:
            mark = tag(node)
            if mark is None or mark.owner not in passes:
                continue
            for prefix in prefixes:
                site = at.get((prefix.removesuffix("."), mark.site))
                if site is not None and (site.path, mark.owner) not in found:
                    step = passes[mark.owner].at(site)
                    assert isinstance(step, Adapter)
                    found[site.path, mark.owner] = (site, mark.owner, step)
    rank = {owner: position for position, owner in enumerate(passes)}
    return sorted(found.values(), key=lambda place: rank[place[1]])


def by_weight(graph: Graph, found: list[Fold]) -> dict[str, list[Fold]]:
    """Full name of a weight → the adapters that fold into it.

    A weight read at several sites (tied embeddings) is split: where the readers are adapted differently, the reader
    that is not the weight's own module gets its own copy, under its own name. `untied` lists those names. What nothing
    but adapters of the whole weight has changed stays one.

    Raises:
        UnsupportedError: the second reader has no name of its own to untie it to.
    """
    readers: dict[str, set[str]] = {}
    for site in sites(graph):
        readers.setdefault(site.weight, set()).add(site.path)
    groups: dict[str, list[Fold]] = {}
    for fold in found:
        name = fold.site.weight
        if len(readers[name]) > 1 and f"{fold.site.path}.weight" != name:
            name = f"{fold.site.path}.weight"
            if graph.ties.get(name) != fold.site.weight:
                raise UnsupportedError(
                    f"{fold.site.path} reads a weight that {sorted(readers[fold.site.weight])} share",
                    fold.site.weight,
                    "leave one of them out with --exclude",
                )
        groups.setdefault(name, []).append(fold)
    for name in dict.fromkeys(graph.ties.values()):
        tied = [other for other in (name, *graph.ties) if other in groups and graph.resolve(other) == name]
        if all(_follows(groups[other]) for other in tied):
            same = [groups.pop(other) for other in tied]
            groups.update({name: same[0]} if same else {})
    return groups


def _follows(group: list[Fold]) -> bool:
    """Whether these adapters are at every site that reads their weight, so that it stays one weight."""
    return bool(group) and all(item.step.whole_weight for item in group)


def untied(graph: Graph, groups: Mapping[str, list[Fold]]) -> dict[str, str]:
    """Ties that merging breaks: alias → the weight it was. Either side being adapted alone breaks the tie."""
    return {
        alias: name
        for alias, name in graph.ties.items()
        if alias in groups or (name in groups and not _follows(groups[name]))
    }


def by_bias(graph: Graph, found: list[Fold]) -> dict[str, list[Fold]]:
    """Full name of a bias → every adapter of its layer, where one of them changes the bias.

    Raises:
        UnsupportedError: two layers read this bias.
    """
    readers: dict[str, set[str]] = {}
    for site in sites(graph):
        readers.setdefault(site.bias, set()).add(site.path)
    names = dict.fromkeys(item.site.bias for item in found if item.step.changes_bias and item.site.bias)
    for name in names:
        if len(readers[name]) > 1:
            raise UnsupportedError(
                f"{sorted(readers[name])} share a bias", name, "leave one of them out with --exclude"
            )
    return {name: [item for item in found if item.site.bias == name] for name in names}


def normals(
    found: list[Fold], weight: Callable[[], torch.Tensor], bias: Callable[[], torch.Tensor | None]
) -> list[Normal]:
    """The normal forms of the adapters of one layer, each over what those before it make of W `[out, in]` and bias."""
    made: list[Normal] = []
    for item in found:
        below = list(made)
        base = Base(lambda n=below: stacked(weight(), n), lambda n=below: _stacked_bias(bias, n))  # type: ignore[misc]
        made.append(item.normal(base))
    return made


def stacked(weight: torch.Tensor, below: list[Normal]) -> torch.Tensor:
    """W `[out, in]` with adapters folded in, in order."""
    for normal in below:
        weight = normal.merged(weight)
    return weight


def _stacked_bias(bias: Callable[[], torch.Tensor | None], below: list[Normal]) -> torch.Tensor | None:
    last = next((normal.bias for normal in reversed(below) if normal.bias is not None), None)
    return bias() if last is None else last


class MergedValues(Mapping[str, torch.Tensor]):
    """The values of a graph with adapters folded in when they are read, rounded once to the stored dtype."""

    def __init__(self, graph: Graph, groups: dict[str, list[Fold]], broken: dict[str, str]) -> None:
        self._graph, self._groups, self._broken = graph, groups, broken
        self._biases = by_bias(graph, [item for group in groups.values() for item in group])

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = value_of(self._graph, self._broken.get(name, name))
        dtype = self._graph.values[name].dtype if is_held(self._graph, name) else stored.dtype
        if name in self._biases:
            changed = _stacked_bias(lambda: None, self._normals(name, self._biases[name]))
            return stored if changed is None else changed.to(stored.dtype)
        if name not in self._groups:
            return stored.to(dtype)
        group = self._groups[name]
        site = group[0].site
        return site.stored(stacked(site.matrix(_wide(stored)), self._normals(name, group))).to(dtype)

    def _normals(self, name: str, group: list[Fold]) -> list[Normal]:
        site = group[0].site
        weight = site.weight if name == site.bias else self._broken.get(name, name)
        bias = site.bias
        return normals(
            group,
            lambda: site.matrix(_wide(value_of(self._graph, weight))),
            lambda: value_of(self._graph, bias) if bias else None,
        )

    @property
    def base(self) -> Mapping[str, torch.Tensor]:
        """The graph's own values."""
        return self._graph.values

    def changes(self, name: str) -> bool:
        """Whether a value is another than the graph's own."""
        return name in self._groups or name in self._biases or name in self._broken

    def __iter__(self) -> Iterator[str]:
        yield from self._graph.values
        yield from (name for name in self._broken if name not in self._graph.values)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._graph.values or name in self._broken


def _wide(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def value_of(graph: Graph, name: str) -> torch.Tensor:
    """The value of a tensor of the base: its trained one, if it trained itself; what its codes decode to, if held."""
    if is_held(graph, name):
        return held_value(graph, name)
    return graph.inserted[name]() if name in graph.inserted else graph.values[name]


def fold(graph: Graph) -> Graph:
    """A graph without its adapters whose weights compute what they computed; none of them is held in codes any more.

    Raises:
        UsageError: the graph has no adapter that folds into a weight.
    """
    found = folds(graph)
    if not found:
        raise UsageError("there is no adapter to merge", graph.source, "apply one first: surgeon apply --method lora")
    groups = by_weight(graph, found)
    broken = untied(graph, groups)
    gone = {item.owner for item in found} | holders(graph)
    result = without(graph, gone)
    for name in by_bias(graph, found):
        result.inserted.pop(name, None)
    for alias, name in broken.items():
        result.tensors[alias] = graph.tensors[name]
        result.ties.pop(alias)
    return dataclasses.replace(result, values=MergedValues(graph, groups, broken))
