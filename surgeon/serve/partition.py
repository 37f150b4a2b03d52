"""Which linears of a model N processes share, and the part of the graph that one of them computes (Megatron, S-LoRA).

Linears that feed an attention or the middle of an MLP are split by their outputs (COLUMN), the linear that brings the
result back by its inputs (ROW). What stands between the two must treat heads, or numbers of the middle, one by one.
Everything else is computed by every process (WHOLE).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.serve.layout import Layout
from surgeon.sites import ATTENTION, LINEAR, Site, argument_of, input_position, sites

WHOLE, COLUMN, ROW = "whole", "column", "row"
aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_LAST = (aten.slice.Tensor, aten.mean.dim, aten.cat.default)
_EACH = (
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.silu.default, aten.gelu.default,
    aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.pow.Tensor_Scalar, aten.rsqrt.default,
    aten.to.dtype, aten.type_as.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
)  # fmt: skip


@dataclass(frozen=True)
class Share:
    """One process's share: the n-th of `size`."""

    rank: int
    size: int

    def of(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """Its part of a tensor along an axis."""
        return tensor.chunk(self.size, axis)[self.rank]


class _Unshared(Exception):
    """What stands between two linears does not work on a part."""


def roles(graph: Graph, size: int) -> dict[str, str]:
    """Path of a linear → COLUMN, ROW or WHOLE.

    Raises:
        UnsupportedError: the heads of an attention cannot be split over so many processes.
    """
    for attention in sites(graph, ATTENTION):
        if attention.heads % size or attention.queries % size:
            what = f"{attention.queries} query heads and {attention.heads} K/V heads cannot be split over {size}"
            raise UnsupportedError(what, attention.path, "--tensor-parallel takes a number that divides both")
    found: dict[str, str] = {}
    for layer in dict.fromkeys(site.layer for site in sites(graph, ATTENTION)):
        found |= _layer(graph, layer, size)
    return found


def _layer(graph: Graph, layer: str, size: int) -> dict[str, str]:
    part = graph.layers[layer] if layer else graph.trunk
    linears = {site.node: site for site in sites(graph, LINEAR) if site.layer == layer}
    found: dict[str, str] = {}
    reached = set[fx.Node]()
    for node in part.nodes:
        if node.name not in linears:
            continue
        try:
            sources, between = _behind(node, set(linears))
        except _Unshared:
            continue
        fits = all(linears[source.name].out % size == 0 for source in sources) and linears[node.name].inp % size == 0
        if (
            fits
            and sources
            and all(user in between or user is node for n in (*sources, *between) for user in _users(n))
        ):
            reached |= between
            found[linears[node.name].path] = ROW
            found |= {linears[source.name].path: COLUMN for source in sources}
    left = [s.path for s in sites(graph, ATTENTION) if s.layer == layer and not _inside(part, s, reached)]
    if left:
        what = "what stands around this attention cannot be split by heads"
        raise UnsupportedError(what, left[0], "serve this model in one process, without --tensor-parallel")
    return found


def _inside(part: fx.Graph, site: Site, reached: set[fx.Node]) -> bool:
    return any(node.name == site.node for node in reached)


def _closed(node: fx.Node, sources: set[fx.Node], between: set[fx.Node]) -> bool:
    """Whether nothing else reads what is split."""
    return all(user in between or user is node for one in (*sources, *between) for user in _users(one))


def _divide(node: fx.Node, sources: set[fx.Node], linears: Mapping[str, Site], size: int) -> bool:
    return all(width % size == 0 for width in (linears[node.name].inp, *(linears[one.name].out for one in sources)))


def _users(node: fx.Node) -> Iterator[fx.Node]:
    return (user for user in node.users if user.target is not aten.sym_size.int)


def _behind(node: fx.Node, linears: set[str]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The linears whose outputs make a linear's input, and what stands between; raises _Unshared."""
    sources, between, waiting = set[fx.Node](), set[fx.Node](), [argument_of(node, input_position(node))]
    while waiting:
        current = waiting.pop()
        if current in sources or current in between:
            continue
        if current.name in linears:
            sources.add(current)
            continue
        between.add(current)
        waiting += _operands(current)
    return sources, between


def _operands(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node that are split, if it works on a part of them."""
    target: Any = node.target
    if target is torch.ops.surgeon.attention.default:
        if len(node.args) > 5 and node.args[5] is not None:
            raise _Unshared
        return [argument for argument in node.args[:3] if isinstance(argument, fx.Node)]
    given = [argument for argument in node.all_input_nodes if isinstance(argument.meta.get("val"), torch.Tensor)]
    if not given or node.op != "call_function":
        raise _Unshared
    value: torch.Tensor = node.meta["val"]
    if target in _RESHAPES:
        sizes: Any = node.args[1]
        if -1 not in sizes[2:3]:
            raise _Unshared
        return given[:1]
    if target is aten.transpose.int and set(node.args[1:]) == {1, 2} and value.dim() == 4:
        return given
    if target in _LAST and value.dim() == 4 and _axis(node) in (-1, 3):
        return given
    if target in _EACH:
        return [other for other in given if not _common(other, value)]
    raise _Unshared


def _axis(node: fx.Node) -> int:
    place: Any = node.args[1] if len(node.args) > 1 else 0
    return int(place[0]) if isinstance(place, (list, tuple)) else int(place)


def _common(operand: fx.Node, value: torch.Tensor) -> bool:
    """Whether an operand is the same for all heads: cosines and sines, the weight of a norm over one head."""
    given: torch.Tensor = operand.meta["val"]
    if value.dim() != 4:
        return given.dim() == 0
    return given.dim() <= 1 or (given.dim() == 4 and given.shape[1] == 1)


def layout_of(layout: Layout, share: Share) -> Layout:
    """The layout of one process's pool: its heads, and pages with room for the widest row."""
    attentions = tuple(
        dataclasses.replace(site, heads=site.heads // share.size, queries=site.queries // share.size)
        for site in layout.attentions
    )
    unit = max(site.heads * max(site.inp, site.out) for site in attentions)
    widest = max([layout.hidden, *(max(site.inp, site.out) for site in layout.linears)])
    block = max(layout.block, -(-widest // unit))
    return dataclasses.replace(layout, attentions=attentions, block=block, page=2 * block * unit)


def partitioned(graph: Graph, roles: Mapping[str, str], layout: Layout, share: Share) -> Graph:
    """One process's part of a graph with the slora pass: its parts of the weights, and operators that ask the others.

    Args:
        graph: with fx graphs that nothing else uses.
        roles: of its linears.
        layout: of the process's pool.
        share: which process.
    """
    cuts = dict[str, Callable[[torch.Tensor], torch.Tensor]]()
    for site in layout.linears:
        if roles.get(site.path) == COLUMN:
            cuts |= dict.fromkeys((site.weight, site.bias), lambda tensor: share.of(tensor, 0))
        elif roles.get(site.path) == ROW:
            cuts[site.weight] = lambda tensor: share.of(tensor, 1)
            cuts[site.bias] = lambda tensor: tensor if share.rank == 0 else torch.zeros_like(tensor)
    cuts.pop("", None)
    result = graph.copy()
    for name, cut in cuts.items():
        result.tensors[name] = dataclasses.replace(graph.tensors[name], shape=_shape(graph.tensors[name].shape, cut))
    result.values = Cut(graph.values, cuts)
    known = {(site.layer, site.node): roles.get(site.path, WHOLE) for site in layout.linears}
    for part, paths in graph.groups():
        for node in part.nodes:
            if node.target is torch.ops.surgeon.paged_attention.default:
                node.kwargs = {**node.kwargs, "page": layout.page, "block": layout.block}
            if node.target is torch.ops.surgeon.pooled_bypass.default:
                base: Any = node.args[0]
                role = known.get((paths[0], base.name), WHOLE)
                if role != WHOLE:
                    node.target = torch.ops.surgeon.shared_bypass.default
                    node.kwargs = {**node.kwargs, "column": role == COLUMN}
    return result


def _shape(shape: tuple[int, ...], cut: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, ...]:
    return tuple(cut(torch.empty(shape, device="meta")).shape)


class Cut(Mapping[str, torch.Tensor]):
    """Tensors by name, of which some are a part; the whole is read when it is asked for, and not kept."""

    def __init__(
        self, whole: Mapping[str, torch.Tensor], cuts: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    ) -> None:
        self.whole, self.cuts = whole, cuts

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.whole[name]
        return self.cuts[name](tensor).clone() if name in self.cuts else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.whole)

    def __len__(self) -> int:
        return len(self.whole)
