"""Products with a turned weight as `com.microsoft.FusedMatMul`, which reads it as it is stored.

ONNX Runtime turns a constant `Transpose(W)` when it loads a model: seconds, and a second copy of the weight in memory.
FusedMatMul is its MatMul kernel with a flag instead, prepacked alike. Other runtimes fuse the pair themselves.
"""

from __future__ import annotations

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


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 2


def _replace(graph: ir.Graph, node: ir.Node, fresh: ir.Node) -> None:
    old, new = node.outputs[0], fresh.outputs[0]
    name, kind, shape = old.name, old.type, old.shape
    graph.insert_before(node, fresh)
    for position, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[position] = new
    old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    new.name, new.type, new.shape = name, kind, shape
