"""Folding trained adapters into the weights they stand beside: the first back end of the normal form.

`folds` lists what is adapted where, `fold` takes the adapters' nodes out of the graph and puts merged weights behind the
same names, lazily. Both know only `Normal`s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph, Tag, copied, structure, sweep, tag
from surgeon.normal import Base, Normal
from surgeon.passes.base import Adapter
from surgeon.run import owners
from surgeon.sites import CONV1D, EMBEDDING, Site, sites

TRANSPOSED = (CONV1D, EMBEDDING)


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
        """The normal form; `base` is the layer as the adapters below this one leave it."""
        return self.step.normal({name: read() for name, read in self.params.items()}, self.site, base)


def folds(graph: Graph) -> list[Fold]:
    """Every adapter of the graph, in the order they were applied, layer by layer."""
    passes = {owner: step for owner, step in owners(graph.applied).items() if isinstance(step, Adapter)}
    at = {(site.layer, site.node): site for site in sites(graph)}
    found: dict[tuple[str, str], Fold] = {}
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
                    found[site.path, mark.owner] = Fold(site, mark.owner, step, _params(graph, site, mark.owner))
    rank = {owner: position for position, owner in enumerate(passes)}
    return sorted(found.values(), key=lambda f: rank[f.owner])


def _params(graph: Graph, site: Site, owner: str) -> dict[str, Callable[[], torch.Tensor]]:
    own, shared = f"{site.path}.{owner}.", f"{owner}."
    return {
        name.removeprefix(prefix): graph.inserted[name]
        for prefix in (shared, own)
        for name in graph.inserted
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }


def by_weight(graph: Graph, found: list[Fold]) -> dict[str, list[Fold]]:
    """Full name of a weight → the adapters that fold into it.

    A weight read at several sites (tied embeddings) is split: where the readers are adapted differently, the reader
    that is not the weight's own module gets its own copy, under its own name. `untied` lists those names.

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
    return groups


def untied(graph: Graph, groups: Mapping[str, list[Fold]]) -> dict[str, str]:
    """Ties that merging breaks: alias → the weight it was. Either side being adapted alone breaks the tie."""
    return {alias: name for alias, name in graph.ties.items() if alias in groups or name in groups}


def merged(weight: torch.Tensor, found: list[Fold], bias: Callable[[], torch.Tensor | None]) -> torch.Tensor:
    """A stored weight with adapters folded in, in order, in fp32 and in the orientation it is stored in."""
    turned = found[0].site.kind in TRANSPOSED
    result = (weight.t() if turned else weight).float() if weight.dtype != torch.float64 else weight
    for item in found:
        below = result
        result = item.normal(Base(lambda w=below: w, bias)).merged(below)  # type: ignore[misc]
    return result.t() if turned else result


class MergedValues(Mapping[str, torch.Tensor]):
    """The values of a graph with adapters folded in when they are read, rounded once to the stored dtype."""

    def __init__(self, graph: Graph, groups: dict[str, list[Fold]], broken: dict[str, str]) -> None:
        self._graph, self._groups, self._broken = graph, groups, broken

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._graph.values[self._broken.get(name, name)]
        found = self._groups.get(name)
        return merged(weight, found, self._bias(found[0].site)).to(weight.dtype) if found else weight

    def _bias(self, site: Site) -> Callable[[], torch.Tensor | None]:
        return lambda: self._graph.values[site.bias] if site.bias else None

    def __iter__(self) -> Iterator[str]:
        yield from self._graph.values
        yield from (name for name in self._broken if name not in self._graph.values)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._graph.values or name in self._broken


def fold(graph: Graph) -> Graph:
    """A graph without its adapters whose weights compute what they computed.

    Raises:
        UsageError: the graph has no adapter.
    """
    found = folds(graph)
    if not found:
        raise UsageError("there is no adapter to merge", graph.source, "apply one first: surgeon apply --method lora")
    groups = by_weight(graph, found)
    broken = untied(graph, groups)
    gone = {item.owner for item in found}
    result = without(graph, gone)
    for alias, name in broken.items():
        result.tensors[alias] = graph.tensors[name]
        result.ties.pop(alias)
    return dataclasses.replace(result, values=MergedValues(graph, groups, broken))


def without(graph: Graph, gone: set[str]) -> Graph:
    """The graph with the nodes and tensors of these passes taken out."""
    result = graph.copy()
    result.trunk = _stripped(graph.trunk, gone)
    known = {id(part): _stripped(part, gone) for part, _ in graph.groups()}
    result.layers = {path: known[id(part)] for path, part in graph.layers.items()}
    _drop_unused_inputs(result)
    result.layers = _shared_again(graph, known)
    sweep(result.trunk)
    result.tensors = {name: spec for name, spec in graph.tensors.items() if spec.owner not in gone}
    result.inserted = {name: read for name, read in graph.inserted.items() if name in result.tensors}
    kept = owners(graph.applied)
    result.applied = tuple(step for owner, step in kept.items() if owner not in gone)
    return result


def _shared_again(graph: Graph, known: dict[int, fx.Graph]) -> dict[str, fx.Graph]:
    """The stripped layers; those that only their adapters had told apart share one graph again."""
    untouched = [part for part, _ in graph.groups() if known[id(part)] is part]
    first = {structure(part): part for part in reversed(untouched)}
    for part in known.values():
        if part not in untouched:
            first.setdefault(structure(part), part)
    return {
        path: part if part in untouched else first[structure(part)]
        for path, part in ((path, known[id(before)]) for path, before in graph.layers.items())
    }


def _stripped(part: fx.Graph, gone: set[str]) -> fx.Graph:
    if not any(mark.owner in gone for node in part.nodes if (mark := tag(node))):
        return part
    fresh, mapping = copied(part)
    names = {node.name: node for node in fresh.nodes}
    for node in list(fresh.nodes):
        mark = tag(node)
        if mark and mark.output and mark.owner in gone:
            node.replace_all_uses_with(_below(fresh, names[mark.site], node, gone))
        fed = node.meta.pop("fed", None)
        if fed is not None:
            node.replace_input_with(_input_of(node), mapping.get(fed, fed))
    sweep(fresh)
    return fresh


def _below(part: fx.Graph, base: fx.Node, output: fx.Node, gone: set[str]) -> fx.Node:
    """What `output` replaced: the nearest earlier output at the same site that stays, else the site's own node."""
    current = base
    for node in part.nodes:
        mark = tag(node)
        if node is output:
            return current
        if isinstance(mark, Tag) and mark.output and mark.site == base.name and mark.owner not in gone:
            current = node
    return current


def _input_of(node: fx.Node) -> fx.Node:
    position = 1 if node.target in (torch.ops.aten.addmm.default, torch.ops.aten.embedding.default) else 0
    return node.args[position]  # type: ignore[return-value]


def _drop_unused_inputs(graph: Graph) -> None:
    """Shared tensors that no node of a layer reads any more are no longer handed to it."""
    calls = {str(node.target): node for node in graph.trunk.nodes if node.op == "call_module"}
    for part, paths in graph.groups():
        inputs = [node for node in part.nodes if node.op == "placeholder"]
        dead = {i for i, node in enumerate(inputs) if not node.users and tag(node) is not None}
        if not dead:
            continue
        for path in paths:
            call = calls[path]
            call.args = tuple(arg for i, arg in enumerate(call.args) if i not in dead)
        for i in dead:
            part.erase_node(inputs[i])
