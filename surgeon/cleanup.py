"""What `torch.export` bakes into a graph and surgeon takes out again: device, dtype, assertions, no-ops.

Models are traced in bf16 on meta: every `bfloat16` in the trace means "the dtype of the model" and every `meta` "the
device of the model". Both become attributes the running module supplies, which is why one graph runs on cpu or cuda,
in fp32, bf16 or fp16. A cast back to the model's dtype that ends an fp32 island (norms, softmax) follows the tensor
that the island began with, as `x.to(input_dtype)` does, so that autocast sees what eager code sees.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, sweep

aten = torch.ops.aten

TRACE_DTYPE = torch.bfloat16
_LIMITS = (torch.finfo(TRACE_DTYPE).min, torch.finfo(TRACE_DTYPE).max)
_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
}
_COPIES = {aten.alias.default, aten.lift_fresh_copy.default, aten.detach_.default, aten.detach.default}
_TRANSPOSES = {aten.numpy_T.default, aten.t.default, aten.transpose.int, aten.permute.default, aten.mT.default}
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default}


def clean(graph: fx.Graph) -> None:
    """Remove or retarget everything that ties the traced graph to the machine and dtype it was traced with."""
    _name_sizes(graph)
    _transposed_linears(graph)
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS or _changes_weights(node):
            graph.erase_node(node)
        elif node.target in _COPIES or _is_full_slice(node):
            _forward(graph, node, node.args[0])
        elif node.target is aten.cat.default and (only := _only_part(node)) is not None:
            _forward(graph, node, only)
        elif node.target in _CASTS:
            _retarget_cast(graph, node)
        elif node.op == "call_function":
            _retarget_factory(graph, node)
    _fold_guards(graph)
    sweep(graph)


def _transposed_linears(graph: fx.Graph) -> None:
    """x @ W.T is a linear without bias (Falcon)."""
    for node in list(graph.nodes):
        if node.target is not aten.matmul.default or getattr(node.args[1], "target", None) not in _TRANSPOSES:
            continue
        weight = node.args[1].args[0]
        if weight.op == "get_attr" and weight.meta["val"].dim() == 2:
            node.target, node.args = aten.linear.default, (node.args[0], weight)


def _name_sizes(graph: fx.Graph) -> None:
    """Read every batch size and length off the ids rather than off a mask or positions of the same size.

    `torch.export` proves the sizes of all inputs equal and then names any of them; a K/V cache makes the mask longer.
    """
    sources: dict[str, tuple[fx.Node, int]] = {}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in sorted(inputs, key=lambda n: not str(n.target).endswith("input_ids")):
        for axis, size in enumerate(node.meta["val"].shape):
            sources.setdefault(_symbol(size), (node, axis))
    for node in graph.nodes:
        if node.target is aten.sym_size.int and node.args[0] in inputs:
            node.args = sources[_symbol(node.meta["val"])]


def _changes_weights(node: fx.Node) -> bool:
    """An in-place clamp of a parameter while training (Gemma 3n): base weights are not for a forward to change."""
    if (
        node.op != "call_function"
        or node.users
        or not str(node.target).partition(".")[2].partition(".")[0].endswith("_")
    ):
        return False
    source = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and source.target is aten.detach.default:
        source = source.args[0]
    return isinstance(source, fx.Node) and source.op == "get_attr"


def _only_part(node: fx.Node) -> fx.Node | None:
    """What is concatenated to nothing, as the first keys and values of an empty cache are."""
    parts: Any = node.args[0]
    filled = [part for part in parts if not _is_empty_row(part.meta["val"].shape)]
    return filled[0] if len(filled) == 1 < len(parts) else None


def _is_empty_row(shape: torch.Size) -> bool:
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 0


def _symbol(size: Any) -> str:
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def _forward(graph: fx.Graph, node: fx.Node, source: Any) -> None:
    node.replace_all_uses_with(source)
    graph.erase_node(node)


def _is_full_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (*node.args[2:], *(None, None, None)[len(node.args) - 2 :])[:3]
    return (
        start in (None, 0)
        and isinstance(end, (int, type(None)))
        and (end is None or end >= 2**62)
        and step in (None, 1)
    )


def _cast_dtype(node: fx.Node) -> torch.dtype | None:
    found = [value for value in (*node.args[1:], *node.kwargs.values()) if isinstance(value, torch.dtype)]
    return found[0] if found else None


def _retarget_cast(graph: fx.Graph, node: fx.Node) -> None:
    source, dtype = node.args[0], _cast_dtype(node)
    assert isinstance(source, fx.Node)
    before = source.meta["val"].dtype
    if dtype is None or (dtype == before and not dtype.is_floating_point):
        _forward(graph, node, source)
        return
    with graph.inserting_before(node):
        if dtype != TRACE_DTYPE:
            cast = graph.call_function(aten.to.dtype, (source, dtype))
        elif (origin := _island_start(source)) is not None:
            cast = graph.call_function(aten.type_as.default, (source, origin))
        else:
            cast = graph.call_function(aten.to.dtype, (source, _attribute(graph, MODEL_DTYPE, TRACE_DTYPE)))
    cast.meta = dict(node.meta)
    node.replace_all_uses_with(cast)
    graph.erase_node(node)


def _island_start(source: fx.Node) -> fx.Node | None:
    """The bf16 tensor whose upcast began the fp32 computation that ends in `source`, within one module call."""
    home, seen, queue = source.meta.get("nn_module_stack"), set(), [source]
    while queue:
        node = queue.pop(0)
        if node in seen or node.meta.get("nn_module_stack") != home:
            continue
        seen.add(node)
        if node.target is aten.to.dtype and node.args[0].meta["val"].dtype == TRACE_DTYPE:
            return node.args[0]
        queue.extend(node.all_input_nodes)
    return None


def _attribute(graph: fx.Graph, name: str, value: object) -> fx.Node:
    node = graph.get_attr(name)
    node.meta["val"] = value
    return node


def _same_dtype(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What `dtype=x.dtype` said: the dtype of the operator's own bf16 input, or of the model where it has none."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or getattr(source.meta.get("val"), "dtype", None) != TRACE_DTYPE:
        return _attribute(graph, MODEL_DTYPE, TRACE_DTYPE)
    made = graph.call_function(getattr, (source, "dtype"))
    made.meta.update(val=TRACE_DTYPE, path=node.meta.get("path", ""))
    return made


def _limit(graph: fx.Graph, node: fx.Node, value: float) -> fx.Node:
    """What `torch.finfo(dtype).min` said: fp16 cannot hold bf16's."""
    kind = graph.call_function(torch.finfo, (_same_dtype(graph, node),))
    made = graph.call_function(getattr, (kind, "min" if value < 0 else "max"))
    for part in (kind, made):
        part.meta.update(val=value, path=node.meta.get("path", ""))
    return made


def _retarget_factory(graph: fx.Graph, node: fx.Node) -> None:
    """Device and dtype arguments of any operator but casts."""
    kwargs = dict(node.kwargs)
    with graph.inserting_before(node):
        if isinstance(kwargs.get("device"), torch.device):
            kwargs["device"] = _attribute(graph, MODEL_DEVICE, kwargs["device"])
        for name, value in kwargs.items():
            if value == TRACE_DTYPE:
                kwargs[name] = _same_dtype(graph, node)
        if TRACE_DTYPE in node.args:
            dtype = _same_dtype(graph, node)
            node.args = tuple(dtype if value == TRACE_DTYPE else value for value in node.args)
        for position, value in enumerate(node.args):
            if isinstance(value, float) and value in _LIMITS:
                node.update_arg(position, _limit(graph, node, value))
    kwargs.pop("pin_memory", None)
    if kwargs.get("layout") == torch.strided:
        kwargs.pop("layout")
    node.kwargs = kwargs


def _fold_guards(graph: fx.Graph) -> None:
    """Comparisons of sizes that only fed removed assertions are dead; `eliminate_dead_code` keeps pure ones out."""
    comparisons = (operator.ge, operator.le, operator.eq, operator.and_)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in comparisons and not node.users:
            graph.erase_node(node)
