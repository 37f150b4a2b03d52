"""A model with integers as it would be without the rounding of activations: what the lowering itself is off by.

MatMulNBits at accuracy level 4 rounds its input to 8 bits, as does what ONNX Runtime makes of DequantizeLinear and
MatMul. That is a percent of the logits, in which a small adapter that is lost would not be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.lower.onnx.session import options_of

if TYPE_CHECKING:
    import onnxruntime

_LEVEL, _EXACT = "accuracy_level", 1
_FUSED = "session.qdq_matmulnbits_accuracy_level"
_FOLDER = "session.model_external_initializers_file_folder_path"


def open_unrounded(file: Path) -> onnxruntime.InferenceSession:
    """A session of an export whose products with integers read activations in fp32; its weights are the file's own."""
    import onnx
    import onnxruntime

    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == _LEVEL:
                attribute.i = _EXACT
    options = options_of()
    options.add_session_config_entry(_FUSED, str(_EXACT))
    options.add_session_config_entry(_FOLDER, str(file.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
