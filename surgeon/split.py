"""Cutting a traced graph at its layer markers: one sub-graph per kind of layer, and a trunk that calls them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from surgeon.graph import sweep
from surgeon.layers import Retrace
from surgeon.runs import OPERANDS, Call, Run

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


def split(graph: fx.Graph, followers: dict[str, list[str]], runs: Sequence[Run]) -> Split:
    """Cut `graph` at its markers.

    Args:
        graph: traced and cleaned, with `surgeon::enter`, `leave` and `layers` nodes.
        followers: path of a traced layer → paths of the opaque layers equal to it.
        runs: what each `layers` node stands for.

    Raises:
        Retrace: a layer with followers hands a value on besides its results, or reads another layer's.
    """
    regions = _regions(graph)
    inside = {node: region for region in regions for node in region.nodes}
    for region in regions:
        _check_closed(region, inside, shared=bool(followers.get(region.path)))
    builder = _Builder(graph, regions, inside, followers, runs)
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
        self,
        graph: fx.Graph,
        regions: list[Region],
        inside: dict[fx.Node, Region],
        followers: dict[str, list[str]],
        runs: Sequence[Run],
    ) -> None:
        self.graph, self.inside, self.runs = graph, inside, runs
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
                self._lead(self.region_of[node])
            elif node.target is _surgeon.layers.default:
                self._run(node)
            elif node in self.new or node in self.inside or self._is_marker(node):
                continue
            else:
                self.new[node] = self.trunk.node_copy(node, lambda n: self.new[n])
        sweep(self.trunk)
        self.trunk.lint()
        return Split(self.trunk, self.layers)

    def _is_marker(self, node: fx.Node) -> bool:
        source = node.args[0] if node.target is operator.getitem else None
        opaque = isinstance(source, fx.Node) and source.target is _surgeon.layers.default
        return opaque or source in self.region_of or node.target is _surgeon.leave.default

    def _lead(self, region: Region) -> None:
        """Build the layer's graph and call it from the trunk."""
        layer, self.inputs[region.path], self.results[region.path] = _layer_graph(region, self.inside)
        self.layers[region.path] = layer
        made = self._call(region.path, region, [self.new[node] for node in region.enter.args[0]])
        for result, item in made.items():
            self.new.setdefault(result, item)
        assert region.leave is not None
        for item in region.leave.users:
            self.new[item] = self.new[region.leave.args[0][item.args[1]]]

    def _run(self, node: fx.Node) -> None:
        """Opaque layers: each calls the graph of its equal with its own arguments."""
        run, made = self.runs[node.args[2]], list[list[fx.Node]]()
        operands = [self.new[source] for source in node.args[0]]
        for call in run.calls[: run.taken]:
            given = [operands[i] if number == OPERANDS else made[number][i] for number, i in call.sources.values()]
            made.append(self._follow(call, given))
        items = [item for results in made for item in results]
        self.new.update({user: items[user.args[1]] for user in node.users if user.args[1] < len(items)})

    def _follow(self, call: Call, given: list[fx.Node]) -> list[fx.Node]:
        region = self.leader[call.path]
        self.layers[call.path] = self.layers[region.path]
        made = self._call(call.path, region, given)
        assert region.leave is not None
        return [made[result] for result in region.leave.args[0]]

    def _call(self, path: str, region: Region, given: list[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Call the graph of a layer's kind; the node in the trunk for each of its results."""
        inputs = self.inputs[region.path]
        args = tuple(given[source] if isinstance(source, int) else self._outer(source) for _, source in inputs)
        call = self.trunk.call_module(path, args)
        results = self.results[region.path]
        call.meta = {"path": path, "val": [result.meta["val"] for result in results]}
        made = {}
        for position, result in enumerate(results):
            made[result] = self.trunk.call_function(operator.getitem, (call, position))
            inner = str(result.meta.get("path", "")).removeprefix(region.path)
            made[result].meta = {**result.meta, "path": path + inner}
        return made

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
