"""Numbers of their own for choices between them: what OpenVINO 2026's kernels for attention need.

They take a mask's fill and what a row without any token gets for one number, where both are 0 and one initialiser, and
then fail to compile ("All consumers of a Scalar expression are expected to have the same loop IDs").
"""

from __future__ import annotations

import onnx_ir as ir


def unshare(model: ir.Model) -> None:
    """Give every Where that reads a number which others read too one of its own."""
    for node in model.graph:
        for position, value in enumerate(node.inputs):
            number = None if value is None else value.const_value
            if node.op_type != "Where" or value is None or number is None or len(value.uses()) < 2:
                continue
            if value.is_initializer() and number.size == 1:
                name = f"{node.name}/own_{position}"
                own = ir.Value(name=name, shape=value.shape, type=value.type, const_value=ir.tensor(number, name=name))
                model.graph.register_initializer(own)
                node.replace_input_with(position, own)
