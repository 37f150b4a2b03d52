"""A linear in codes and the low-rank bypass beside it as one call, for evaluation.

    y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ,   W in codes

On a GPU, where the rows are few, the call is one kernel that adds s · (x Aᵀ) times Bᵀ to the tile it holds
(`surgeon.on_gpu.linear`). Anywhere else it is the operators of the graph in their order, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from surgeon import on_gpu
from surgeon.fuse import bypass_of
from surgeon.graph import copied, sweep
from surgeon.kernels.coded_tiles import MOST_ROWS
from surgeon.quantised import MAKERS

_surgeon = torch.ops.surgeon


def joined(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph with those calls; the graph itself where there is no such bypass."""
    if not any(_over_codes(node) for node in graph.nodes):
        return graph
    fresh, _ = copied(graph)
    for node in list(fresh.nodes):
        found = _over_codes(node)
        if found is not None:
            x, bias, *parts = found.base.args
            with fresh.inserting_before(node):
                arguments = (x, bias, found.a, found.b, found.scale, *parts)
                call = fresh.call_function(_CALLS[found.base.target], arguments, dict(found.base.kwargs))
            node.replace_all_uses_with(call)
    sweep(fresh)
    return fresh


def _over_codes(node: fx.Node) -> Any:
    found = bypass_of(node)
    return found if found is not None and found.base.target in MAKERS and not found.drop else None


def _bypassed(
    operator: Any,
    x: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    *parts: Tensor,
    **options: Any,
) -> Tensor:
    """y of a weight in the parts that `operator` takes."""
    few = x.numel() <= MOST_ROWS * x.shape[-1]
    if few and on_gpu.is_gpu(x) and not torch.is_autocast_enabled(x.device.type):
        low = F.linear(x.reshape(-1, x.shape[-1]), a) * scale
        found = on_gpu.linear(x, bias, MAKERS[operator](*parts, **options).args[0], low, b)
        if found is not None:
            return found
    return operator(x, bias, *parts, **options) + F.linear(F.linear(x, a), b) * scale


def nf4_bypassed(*arguments: Any, **options: Any) -> Tensor:
    """x, bias, a, b and s, then what `surgeon.nf4_linear` takes of a weight."""
    return _bypassed(_surgeon.nf4_linear.default, *arguments, **options)


def int_bypassed(*arguments: Any, **options: Any) -> Tensor:
    """x, bias, a, b and s, then what `surgeon.int_linear` takes of a weight."""
    return _bypassed(_surgeon.int_linear.default, *arguments, **options)


_CALLS = {_surgeon.nf4_linear.default: nf4_bypassed, _surgeon.int_linear.default: int_bypassed}
