"""What a layer runs as while it trains: fewer and leaner operators for the same function, the graph itself untouched.

Five rewrites, on a copy of the graph just before it becomes Python (see `surgeon.compile`):

- equal operators on equal inputs run once (q, k and v read A x of a shared A from one product);
- a frozen linear with a low-rank bypass, x Wᵀ + s (x Aᵀ) Bᵀ, is one operator, and all that read one x share it: x is
  kept once, A's are one matrix, and the sums are accumulated by the products (see `bypassed`); with dropout every
  bypass has its own mask, one byte per input; a weight in codes is decoded in the forward and in the backward pass;
- a linear of the model's own weights is one that keeps no input where they are frozen;
- x / rms(x) keeps x and one number per row;
- act(gate) · up keeps gate and up, and computes act(gate) again in the backward pass.

Values and gradients equal the unfused graph's up to rounding. Evaluation runs the graph as it is, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.graph import copied, sweep, tag
from surgeon.lean import bypassed, frozen_linear, gated_gelu, gated_silu, rms_normalised
from surgeon.quantised import MAKERS

aten = torch.ops.aten


def fused(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph with the rewrites above; the graph itself where it writes in place."""
    if any(_mutates(node) for node in graph.nodes):
        return graph
    fresh, _ = copied(graph)
    share_equals(fresh)
    fuse_bypasses(fresh)
    fuse_linears(fresh)
    fuse_norms(fresh)
    fuse_gates(fresh)
    sweep(fresh)
    return fresh


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def share_equals(graph: fx.Graph) -> None:
    """Common sub-expressions once; operators that draw random numbers stay apart."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or _draws(node):
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _draws(node: fx.Node) -> bool:
    if node.kwargs.get("dropout_p"):
        return True
    tags = getattr(node.target, "tags", ())
    named = getattr(node.target, "__name__", str(node.target))
    return torch.Tag.nondeterministic_seeded in tags or "dropout" in named or "dot_product" in named


def _hashable(value: Any) -> Any:
    """Arguments as a key; 1, 1.0 and True are different arguments."""
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, slice):
        return (slice, _hashable(value.start), _hashable(value.stop), _hashable(value.step))
    return type(value), value


@dataclass(frozen=True)
class _Bypass:
    """The nodes of y = x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ."""

    total: fx.Node
    base: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    a: fx.Node
    b: fx.Node
    scale: float
    drop: float


def fuse_bypasses(graph: fx.Graph) -> None:
    """Every group of bypasses that read one x as one operator, at the place of the first."""
    by_input: dict[fx.Node, list[_Bypass]] = {}
    for node in graph.nodes:
        found = bypass_of(node)
        if found is not None:
            by_input.setdefault(found.base.args[0], []).append(found)
    for x, group in by_input.items():
        with graph.inserting_before(group[0].base):
            tensors = [n for one in group for n in (_weight(graph, one), *_again_all(graph, one.bias, one.a, one.b))]
            scales, drops = tuple(one.scale for one in group), tuple(one.drop for one in group)
            call = graph.call_function(bypassed, (x, scales, drops, *tensors))
            results = [graph.call_function(_item, (call, i)) for i in range(len(group))]
        for one, result in zip(group, results, strict=True):
            one.total.replace_all_uses_with(result)
    sweep(graph)
    for node in [n for n in graph.nodes if n.target is aten.dropout.default and not n.users]:
        graph.erase_node(node)  # the sweep keeps what draws random numbers; the operator draws them now


def _item(values: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
    return values[index]


def _weight(graph: fx.Graph, one: _Bypass) -> fx.Node | None:
    """The weight; of a quantised linear, what makes it of its codes."""
    if one.weight is not None:
        return _again(graph, one.weight)
    parts = _again_all(graph, *one.base.args[2:])
    return graph.call_function(MAKERS[one.base.target], tuple(parts), dict(one.base.kwargs))


def _again_all(graph: fx.Graph, *nodes: fx.Node | None) -> list[fx.Node | None]:
    return [_again(graph, node) for node in nodes]


def _again(graph: fx.Graph, node: fx.Node | None) -> fx.Node | None:
    if node is None or node.op == "placeholder":
        return node
    if node.op == "get_attr":
        return graph.create_node("get_attr", node.target)
    return graph.node_copy(node, lambda source: _again(graph, source) or source)


def _is_held(node: fx.Node) -> bool:
    """Whether a node is a tensor of the model, or computed from such tensors alone (B diag(λ))."""
    if node.op in ("get_attr", "placeholder"):
        return node.op == "get_attr" or tag(node) is not None
    return node.op == "call_function" and not _draws(node) and all(map(_is_held, node.all_input_nodes))


def bypass_of(total: fx.Node) -> _Bypass | None:
    """The bypass whose sum with a frozen linear is `total`, None if it is no such sum."""
    if not _is(total, aten.add.Tensor) or total.kwargs:
        return None
    base, scaled = total.args
    if not (any(_only(base, linear) for linear in (aten.linear.default, *MAKERS)) and _only(scaled, aten.mul.Tensor)):
        return None
    high, scale = scaled.args
    if not _only(high, aten.linear.default) or not isinstance(scale, (int, float)):
        return None
    low = high.args[0]
    if not _only(low, aten.linear.default):
        return None
    x, drop = _undropped(low.args[0])
    if x is not base.args[0]:
        return None
    a, b = low.args[1:], high.args[1:]
    weight, bias = _frozen(base)
    frozen = base.all_input_nodes[1:]
    if len(a) > 1 or len(b) > 1 or any(n.op != "get_attr" for n in frozen) or not all(map(_is_held, (*a, *b))):
        return None
    return _Bypass(total, base, weight, bias, a[0], b[0], float(scale), drop)


def _frozen(base: fx.Node) -> tuple[Any, Any]:
    """Weight and bias of a linear; no weight where it is in codes."""
    if base.target in MAKERS:
        return None, base.args[1]
    return base.args[1], base.args[2] if len(base.args) > 2 else None


def _undropped(x: Any) -> tuple[Any, float]:
    """What a dropout that one node reads is of, and its probability."""
    if _only(x, aten.dropout.default) and x.args[2] is True:
        return x.args[0], float(x.args[1])
    return x, 0.0


def fuse_linears(graph: fx.Graph) -> None:
    """Linears of tensors that the model holds, by `frozen_linear`: whether they are frozen is asked in the run."""
    for node in list(graph.nodes):
        held = [n for n in node.args[1:] if n is not None]
        if _is(node, aten.linear.default) and all(n.op == "get_attr" for n in held):
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(frozen_linear, node.args))


def fuse_norms(graph: fx.Graph) -> None:
    """x · rsqrt(mean(x²) + eps) as one operator."""
    for node in list(graph.nodes):
        found = _norm(node)
        if found is not None:
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.call_function(rms_normalised, found))


def _norm(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, eps) of an RMS normalisation over the last axis."""
    if not _is(node, aten.mul.Tensor):
        return None
    x, scale = node.args
    if not _only(scale, aten.rsqrt.default) or not _only(scale.args[0], aten.add.Tensor):
        return None
    mean, eps = scale.args[0].args
    if not _only(mean, aten.mean.dim) or mean.args[1:] != ([-1], True) or not isinstance(eps, float):
        return None
    square = mean.args[0]
    fits = _only(square, aten.pow.Tensor_Scalar) and square.args == (x, 2)
    return (x, eps) if fits else None


_GATES: dict[Any, Callable[..., torch.Tensor]] = {aten.silu.default: gated_silu, aten.gelu.default: gated_gelu}


def fuse_gates(graph: fx.Graph) -> None:
    """act(gate) · up as one operator, in either order."""
    for node in list(graph.nodes):
        if not _is(node, aten.mul.Tensor):
            continue
        for act, up in _orders(node):
            fits = getattr(act, "target", None) in _GATES and len(act.users) == 1
            if fits and isinstance(up, fx.Node) and up is not act:
                with graph.inserting_before(node):
                    call = graph.call_function(_GATES[act.target], (act.args[0], up), dict(act.kwargs))
                node.replace_all_uses_with(call)
                break


def _orders(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    first, second = node.args
    yield first, second
    yield second, first


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _only(node: Any, target: Any) -> bool:
    """A call of `target` that one node reads."""
    return _is(node, target) and len(node.users) == 1
