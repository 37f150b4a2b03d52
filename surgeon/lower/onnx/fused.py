"""What ONNX Runtime has one operator for, where two parts of a model meet that were lowered apart.

Products with a turned weight are `com.microsoft.FusedMatMul`, which reads it as it is stored. ONNX Runtime turns a
constant `Transpose(W)` when it loads a model: seconds, and a second copy of the weight in memory. FusedMatMul is its
MatMul kernel with a flag instead, prepacked alike. Other runtimes fuse the pair themselves.

The sum at the end of a layer and the norm at the start of the next are one operator that returns both,
`com.microsoft.SkipSimplifiedLayerNormalization`.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

DOMAIN = "com.microsoft"


def fuse(model: ir.Model) -> int:
    """MatMul(x, Transpose(W)) of a matrix W that the model stores → FusedMatMul(x, W, transB=1); returns how many."""
    graph, count = model.graph, 0
    for node in list(graph):
        if node.op_type != "MatMul" or node.domain:
            continue
        turn = node.inputs[1].producer() if node.inputs[1] is not None else None
        if turn is None or turn.op_type != "Transpose" or not _is_matrix(turn.inputs[0]):
            continue
        fused = ir.node("FusedMatMul", [node.inputs[0], turn.inputs[0]], {"transB": 1}, domain=DOMAIN, name=node.name)
        _replace(graph, node, fused)
        count += 1
        if not turn.outputs[0].uses():
            graph.remove(turn, safe=True)
    if count:
        graph.opset_imports[DOMAIN] = 1
    return count


def join_sums(model: ir.Model, sums: Iterable[ir.Node]) -> int:
    """Sums and the RMS norm that reads them as one operator, which returns both; returns how many.

    Args:
        model: the model.
        sums: its sums of two tensors of one shape.
    """
    count = 0
    for node in sums:
        norm = next(
            (user for user, _ in node.outputs[0].uses() if user.op_type == "SimplifiedLayerNormalization"), None
        )
        if norm is None:
            continue
        given = [*node.inputs, norm.inputs[1]]
        options = {"epsilon": norm.attributes["epsilon"].value}
        name = "SkipSimplifiedLayerNormalization"
        both = ir.node(name, given, options, domain=DOMAIN, name=norm.name, num_outputs=4)
        both.outputs[1].name = both.outputs[2].name = ""  # the mean and its root, which training reads
        model.graph.insert_before(node, both)
        _take_over(model.graph, node, both.outputs[3])
        _take_over(model.graph, norm, both.outputs[0])
        count += 1
    if count:
        model.graph.opset_imports[DOMAIN] = 1
    return count


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _replace(graph: ir.Graph, node: ir.Node, fresh: ir.Node) -> None:
    graph.insert_before(node, fresh)
    _take_over(graph, node, fresh.outputs[0])


def _take_over(graph: ir.Graph, node: ir.Node, new: ir.Value) -> None:
    """A value in the place of a node's output, under its name."""
    old = node.outputs[0]
    name, kind, shape = old.name, old.type, old.shape
    for position, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[position] = new
    old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    new.name, new.type, new.shape = name, kind, shape
