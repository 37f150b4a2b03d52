"""Taking passes out of a graph again: their nodes, tensors and inputs, and what they had told apart."""

from __future__ import annotations

import dataclasses

from torch import fx

from surgeon import wiring
from surgeon.graph import Graph, Tag, TensorSpec, copied, structure, sweep, tag
from surgeon.hold import release
from surgeon.quantised import HELD
from surgeon.run import owners
from surgeon.sites import GIVEN, source_of


def without(graph: Graph, gone: set[str]) -> Graph:
    """The graph with the nodes and tensors of these passes taken out."""
    result = graph.copy()
    result.trunk = _stripped(copied(graph.trunk)[0], gone)
    known = {id(part): _stripped(part, gone) for part, _ in graph.groups()}
    result.layers = {path: known[id(part)] for path, part in graph.layers.items()}
    _drop_unused_inputs(result)
    result.layers = _shared_again(graph, known)
    sweep(result.trunk)
    _drop_inputs(result.trunk, gone)
    result.tensors = {name: _freed(spec, gone) for name, spec in graph.tensors.items() if spec.owner not in gone}
    result.inserted = {name: read for name, read in graph.inserted.items() if name in result.tensors}
    kept = owners(graph.applied)
    result.applied = tuple(step for owner, step in kept.items() if owner not in gone)
    return result


def _freed(spec: TensorSpec, gone: set[str]) -> TensorSpec:
    """A weight whose codes are gone is no longer held in them."""
    return dataclasses.replace(spec, held=None) if spec.held is not None and spec.held.owner in gone else spec


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
    if not any(_touched(node, gone) for node in part.nodes):
        return part
    fresh, _ = copied(part)
    names = {node.name: node for node in fresh.nodes}
    for node in list(fresh.nodes):
        _ungive(node, gone)
        if HELD in node.meta and node.meta[HELD].owner in gone:
            release(node)
        mark = tag(node)
        if mark and mark.output and mark.owner in gone:
            node.replace_all_uses_with(_below(fresh, names[mark.site], node, gone))
        if mark and mark.input and mark.owner in gone:
            node.replace_all_uses_with(source_of(node))
    for node in reversed(fresh.nodes):  # the sweep keeps what draws random numbers
        mark = tag(node)
        if mark and mark.owner in gone and node.op == "call_function" and not node.users:
            fresh.erase_node(node)
    sweep(fresh)
    return fresh


def _touched(node: fx.Node, gone: set[str]) -> bool:
    mark = node.meta.get(HELD) or tag(node)
    return (mark is not None and mark.owner in gone) or any(owner in gone for owner, *_ in node.meta.get(GIVEN, ()))


def _ungive(node: fx.Node, gone: set[str]) -> None:
    """What passes gave a node besides what they feed it, taken back."""
    given = node.meta.get(GIVEN, ())
    for owner, key, undo in given:
        if owner not in gone:
            continue
        if isinstance(key, int):
            node.args = (*node.args[:key], None, *node.args[key + 1 :])[:undo]
        else:
            rest = {k: v - undo if k == key else v for k, v in node.kwargs.items()}
            node.kwargs = {k: v for k, v in rest.items() if k != key or v}
    if given:
        node.meta[GIVEN] = tuple(one for one in given if one[0] not in gone)


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


def _drop_inputs(trunk: fx.Graph, gone: set[str]) -> None:
    """Inputs of the model that these passes added."""
    for node in wiring.inputs_of(trunk):
        mark = tag(node)
        if mark is not None and mark.owner in gone and not node.users:
            trunk.erase_node(node)


def _drop_unused_inputs(graph: Graph) -> None:
    """Shared tensors that no node of a layer reads any more are no longer handed to it."""
    for part, paths in graph.groups():
        inputs = [node for node in part.nodes if node.op == "placeholder"]
        dead = {i for i, node in enumerate(inputs) if not node.users and tag(node) is not None}
        if not dead:
            continue
        for path in paths:
            for call in wiring.calls_of(graph.trunk, path):
                call.args = tuple(arg for i, arg in enumerate(call.args) if i not in dead)
        for i in dead:
            part.erase_node(inputs[i])
