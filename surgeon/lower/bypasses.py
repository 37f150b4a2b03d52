"""Low-rank bypasses of a final graph as two operators: one product with all A that read one x, and a sum for each B.

y + s · ((x Aᵀ) ⊙ d) Bᵀ [⊙ gain]  →  low_rank_up(y, low_rank_down(x, A of all), B, d, gain, first rank, s)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.artifact import operators
from surgeon.compile import without_dropout
from surgeon.graph import Graph, TensorSpec, copied, sweep, val
from surgeon.quantised import WEIGHTS

aten, surgeon = torch.ops.aten, torch.ops.surgeon
assert operators  # registers the two
_LINEARS = {aten.linear.default, *WEIGHTS}


@dataclass(frozen=True)
class _Found:
    """The nodes of y + s · ((x Aᵀ) ⊙ d) Bᵀ ⊙ gain."""

    total: fx.Node
    y: fx.Node
    x: fx.Node
    a: fx.Node
    b: fx.Node
    d: fx.Node | None
    gain: fx.Node | None
    scale: float


def fuse_bypasses(graph: Graph) -> None:
    """Rewrite the layers of a graph; A of linears with one input become one tensor."""
    for shared, paths in graph.groups():
        part = copied(without_dropout(shared))[0]
        groups: dict[fx.Node, list[_Found]] = {}
        for node in part.nodes:
            found = _bypass(node)
            if found is not None:
                groups.setdefault(found.x, []).append(found)
        for number, group in enumerate(groups.values()):
            _fuse(graph, part, paths, group, number)
        sweep(part)
        graph.layers.update(dict.fromkeys(paths, part))


def _fuse(graph: Graph, part: fx.Graph, paths: list[str], group: list[_Found], number: int) -> None:
    if any(one.a.op != "get_attr" for one in group):
        for one in group:
            _rewrite(part, [one], one.a)
        return
    names = [str(one.a.target) for one in group]
    if len(names) == 1:
        _rewrite(part, group, group[0].a)
        return
    for path in paths:
        full = [graph.resolve(f"{path}.{name}") for name in names]
        shape = (sum(graph.tensors[name].shape[0] for name in full), graph.tensors[full[0]].shape[1])
        own = f"{path}.low_rank_{number}"
        graph.tensors[own] = TensorSpec(shape, graph.tensors[full[0]].dtype, owner=graph.tensors[full[0]].owner)
        graph.inserted[own] = functools.partial(_stacked, [graph.inserted[name] for name in full])
    with part.inserting_before(group[0].y):
        _rewrite(part, group, part.get_attr(f"low_rank_{number}"))


def _stacked(parts: list[Callable[[], torch.Tensor]]) -> torch.Tensor:
    return torch.cat([part() for part in parts])


def _rewrite(part: fx.Graph, group: list[_Found], a: fx.Node) -> None:
    with part.inserting_before(group[0].y):
        a = a if a.op != "get_attr" else part.get_attr(str(a.target))
        low = part.call_function(surgeon.low_rank_down.default, (group[0].x, a))
    first = 0
    for one in group:
        with part.inserting_before(one.total):
            rest = (one.b, one.d, one.gain, first, one.scale)
            made = part.call_function(surgeon.low_rank_up.default, (one.y, low, *rest))
        made.meta = dict(one.total.meta)
        one.total.replace_all_uses_with(made)
        first += int(val(one.b).shape[1])


def _bypass(total: fx.Node) -> _Found | None:
    """What a sum is of, None if it is no bypass."""
    if total.target is not aten.add.Tensor or total.kwargs or not isinstance(total.args[1], fx.Node):
        return None
    y, part = total.args
    scale, gain, d = 1.0, None, None
    if part.target is aten.mul.Tensor:
        part, factor = part.args
        scale, gain = (1.0, factor) if isinstance(factor, fx.Node) else (float(factor), None)
    if getattr(y, "target", None) not in _LINEARS or not _is_product(part):
        return None
    low, b = part.args
    if low.target is aten.mul.Tensor and isinstance(low.args[1], fx.Node):
        low, d = low.args
    if not _is_product(low) or low.args[0] is not y.args[0]:
        return None
    vectors = [one for one in (d, gain) if one is not None]
    if any(val(one).dim() != 1 or one.op != "get_attr" for one in vectors) or len(low.users) > 1:
        return None
    return _Found(total, y, low.args[0], low.args[1], b, d, gain, scale)


def _is_product(node: Any) -> bool:
    """A linear without a bias that one node reads."""
    return node.target is aten.linear.default and len(node.args) == 2 and len(node.users) == 1
