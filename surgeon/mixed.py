"""A base in bf16 or fp16 with adapters in fp32: casts where one meets the other.

Adapters are kept in fp32 (their updates are too small for bf16), whatever the base is stored in. Outside autocast what
an adapter reads is brought to fp32 and what it returns to the dtype of the model, as PEFT does. The graph itself says
nothing of dtypes; the casts belong to the function it is compiled to.
"""

from __future__ import annotations

import torch
from torch import fx

from surgeon.graph import MODEL_DTYPE, copied, tag

aten = torch.ops.aten


_JOINS = (aten.cat.default, aten.where.self, aten.index_copy.default)


def with_casts(graph: fx.Graph) -> fx.Graph:
    """The same graph computing in fp32 whatever passes with tensors of their own inserted; itself if there is none."""
    owners = {mark.owner for node in graph.nodes if node.op == "get_attr" and (mark := tag(node))}
    if not owners:
        return graph
    mixed, _ = copied(graph)
    raised: dict[fx.Node, fx.Node] = {}
    lowered: set[fx.Node] = set()
    for node in list(mixed.nodes):
        mark = tag(node)
        if mark is None or mark.owner not in owners or node.op != "call_function":
            continue
        if node.target in _JOINS and _join(mixed, node, owners, lowered):
            lowered.add(node)
            continue
        for source in node.all_input_nodes:
            inserted = _is_inserted(source, owners) and source not in lowered
            if _is_float(source) and not inserted:
                node.replace_input_with(source, _raised(mixed, source, raised))
        if (mark.output or mark.input) and _is_float(node):
            lowered.add(_lowered(mixed, node))
    return mixed


def _is_inserted(node: fx.Node, owners: set[str]) -> bool:
    mark = tag(node)
    return mark is not None and mark.owner in owners


def _join(graph: fx.Graph, node: fx.Node, owners: set[str], lowered: set[fx.Node]) -> bool:
    """Tensors of passes beside the model's own, in its dtype: nothing is computed, and K, V and logits are large."""
    sources = [source for source in node.all_input_nodes if _is_float(source)]
    raised = [source for source in sources if _is_inserted(source, owners) and source not in lowered]
    if len(raised) == len(sources):
        return False
    for source in raised:
        node.replace_input_with(source, _cast(graph, source))
    return True


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _raised(graph: fx.Graph, source: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """The source in fp32, once for all who read it."""
    if source not in known:
        with graph.inserting_after(source):
            known[source] = graph.call_function(aten.to.dtype, (source, torch.float32))
        known[source].meta = {**source.meta, "surgeon": None}
    return known[source]


def _lowered(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What everything else reads in place of an adapter's result: the same in the dtype of the model."""
    cast = _cast(graph, node)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    return cast


def _cast(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A node in the dtype of the model."""
    with graph.inserting_after(node):
        dtype = graph.get_attr(MODEL_DTYPE)
        with graph.inserting_after(dtype):
            cast: fx.Node = graph.call_function(aten.to.dtype, (node, dtype))
    dtype.meta["val"] = torch.bfloat16
    cast.meta = {**node.meta, "surgeon": None}
    return cast
