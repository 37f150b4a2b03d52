"""Cutting a traced graph at its layer markers: one sub-graph per kind of layer, and a trunk that calls them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from surgeon.graph import sweep
from surgeon.layers import Retrace

_surgeon = torch.ops.surgeon


@dataclass
class Region:
    """The nodes of one traced layer, between its markers.

    Attributes:
        path: the layer's path.
        enter: the marker before; its inputs are the layer's tensor arguments.
        leave: the marker after; its inputs are the layer's tensor results.
        nodes: what lies between.
        free: values from outside the region that it reads without having been given them.
    """

    path: str
    enter: fx.Node
    leave: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    free: list[fx.Node] = field(default_factory=list)


@dataclass
class Split:
    """The trunk and the graph of every layer; equal layers share the object."""

    trunk: fx.Graph
    layers: dict[str, fx.Graph]


def split(graph: fx.Graph, followers: dict[str, list[str]]) -> Split:
    """Cut `graph` at its markers.

    Args:
        graph: traced and cleaned, with `surgeon::enter`, `leave` and `layer` nodes.
        followers: path of a traced layer → paths of the opaque layers equal to it.

    Raises:
        Retrace: a layer with followers hands a value on besides its results, or reads another layer's.
    """
    regions = _regions(graph)
    inside = {node: region for region in regions for node in region.nodes}
    for region in regions:
        _check_closed(region, inside, shared=bool(followers.get(region.path)))
    builder = _Builder(graph, regions, inside, followers)
    return builder.build()


def _regions(graph: fx.Graph) -> list[Region]:
    regions: list[Region] = []
    current: Region | None = None
    for node in graph.nodes:
        if node.target is _surgeon.enter.default:
            current = Region(str(node.args[1]), node)
            regions.append(current)
        elif node.target is _surgeon.leave.default:
            assert current is not None
            current.leave, current = node, None
        elif current is not None and not _is_getitem_of(node, current.enter):
            current.nodes.append(node)
    return regions


def _is_getitem_of(node: fx.Node, source: fx.Node) -> bool:
    return node.target is operator.getitem and node.args[0] is source


def _check_closed(region: Region, inside: dict[fx.Node, Region], *, shared: bool) -> None:
    members = set(region.nodes)
    for node in region.nodes:
        leaks = any(user not in members and user is not region.leave for user in node.users)
        reads = any(inside.get(source, region) is not region for source in node.all_input_nodes)
        if shared and (leaks or reads):
            raise Retrace


class _Builder:
    """Copies nodes into the trunk or into layer graphs, keeping their order."""

    def __init__(
        self, graph: fx.Graph, regions: list[Region], inside: dict[fx.Node, Region], followers: dict[str, list[str]]
    ) -> None:
        self.graph, self.inside = graph, inside
        self.trunk = fx.Graph()
        self.layers: dict[str, fx.Graph] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.region_of = {region.enter: region for region in regions}
        self.leader = {path: r for r in regions for path in (r.path, *followers.get(r.path, ()))}
        self.inputs: dict[str, list[tuple[str, int | fx.Node]]] = {}
        self.results: dict[str, list[fx.Node]] = {}

    def build(self) -> Split:
        for node in self.graph.nodes:
            if node in self.region_of:
                self._call(self.region_of[node], node.args[0], node)
            elif node.target is _surgeon.layer.default:
                self._follow(node)
            elif node in self.new or node in self.inside or self._is_marker(node):
                continue
            else:
                self.new[node] = self.trunk.node_copy(node, lambda n: self.new[n])
        sweep(self.trunk)
        self.trunk.lint()
        return Split(self.trunk, self.layers)

    def _is_marker(self, node: fx.Node) -> bool:
        item = node.target is operator.getitem and node.args[0] in self.region_of
        return item or node.target is _surgeon.leave.default

    def _call(self, region: Region, given: object, marker: fx.Node) -> None:
        """Build the layer's graph and call it from the trunk."""
        layer, inputs, results = _layer_graph(region, self.inside)
        self.inputs[region.path], self.results[region.path] = inputs, results
        self.layers[region.path] = layer
        call = self._emit(region.path, inputs, given, marker)
        assert region.leave is not None
        for position, result in enumerate(results):
            item = self.trunk.call_function(operator.getitem, (call, position))
            item.meta = dict(result.meta)
            self.new.setdefault(result, item)
        for item in region.leave.users:
            self.new[item] = self.new[region.leave.args[0][item.args[1]]]

    def _follow(self, node: fx.Node) -> None:
        """An opaque layer: the same graph, called with its own arguments."""
        path = str(node.args[2])
        region = self.leader[path]
        self.layers[path] = self.layers[region.path]
        call = self._emit(path, self.inputs[region.path], node.args[0], node)
        order = {result: i for i, result in enumerate(self.results[region.path])}
        assert region.leave is not None
        for item in node.users:
            result = region.leave.args[0][item.args[1]]
            made = self.trunk.call_function(operator.getitem, (call, order[result]))
            made.meta = dict(item.meta)
            self.new[item] = made

    def _emit(self, path: str, inputs: list[tuple[str, int | fx.Node]], given: object, like: fx.Node) -> fx.Node:
        args = [
            self.new[given[source]] if isinstance(source, int) else self._outer(source)  # type: ignore[index]
            for _, source in inputs
        ]
        call = self.trunk.call_module(path, tuple(args))
        call.meta = {"path": path, "val": like.meta.get("val")}
        return call

    def _outer(self, node: fx.Node) -> fx.Node:
        """A value from outside the region; attribute reads that only the layer made are repeated in the trunk."""
        if node not in self.new:
            self.new[node] = self.trunk.node_copy(node, lambda n: self._outer(n))
        return self.new[node]


def _layer_graph(
    region: Region, inside: dict[fx.Node, Region]
) -> tuple[fx.Graph, list[tuple[str, int | fx.Node]], list[fx.Node]]:
    """The layer's graph, what feeds each of its inputs (position in `enter`, or an outside node), and its results."""
    layer = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    inputs: list[tuple[str, int | fx.Node]] = []
    members = set(region.nodes)

    def placeholder(node: fx.Node, source: int | fx.Node) -> fx.Node:
        made = layer.placeholder(node.name)
        made.meta = dict(node.meta)
        inputs.append((node.name, source))
        return made

    def item_source(node: fx.Node) -> int | fx.Node:
        return int(node.args[1]) if _is_getitem_of(node, region.enter) else node

    order = [source for node in region.nodes for source in node.all_input_nodes]
    assert region.leave is not None
    order += region.leave.all_input_nodes
    for source in dict.fromkeys(order):
        if source not in members and not _own_attribute(source, region.path):
            new[source] = placeholder(source, item_source(source))
    for source in dict.fromkeys(order):
        if source not in members and _own_attribute(source, region.path):
            new[source] = layer.get_attr(str(source.target).removeprefix(f"{region.path}."))
            new[source].meta = dict(source.meta)
    for node in region.nodes:
        new[node] = layer.node_copy(node, lambda n: new[n])
        new[node].meta["path"] = str(node.meta.get("path", "")).removeprefix(region.path).removeprefix(".")
    results = list(dict.fromkeys(region.leave.args[0]))
    results += [
        n for n in region.nodes if n not in results and any(u not in members and u is not region.leave for u in n.users)
    ]
    layer.output(tuple(new[node] for node in results))
    sweep(layer)
    layer.lint()
    return layer, inputs, results


def _own_attribute(node: fx.Node, path: str) -> bool:
    return node.op == "get_attr" and (
        str(node.target).startswith(f"{path}.") or str(node.target) in ("model_dtype", "model_device")
    )
