"""The web profile: the folder that transformers.js and onnxruntime-web load.

    config.json generation_config.json tokenizer.json tokenizer_config.json
    onnx/model{,_fp16,_int8,_q4}.onnx  onnx/model….onnx_data

An encoder-decoder has two models, encoder_model and decoder_model_merged, with a file of data each.
transformers.js finds a model by its dtype's suffix, external data by the model's name and `_data`, and whether there is
any in config.json. Dimensions are `batch_size`, `sequence_length`, `past_sequence_length`; of an empty cache it
resolves the first by that name and takes all others for 0. Where a model has the input `num_logits_to_keep`, it asks
for the last token's logits alone: a head over the whole prompt costs more than the rest of a small model.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from surgeon.lower.onnx.profiles import Profile

PACKAGE = "transformers.js"
DTYPES = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "q4"}
"""Precision → what transformers.js calls it."""
KEEP = "num_logits_to_keep"
_THROUGH = ("Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity")
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MatMulBnb4")


@dataclass(frozen=True)
class Layout:
    """Names in an export: of the model, and of the file for what it holds itself."""

    model: str
    data: str


def layout(profile: Profile, precision: str, part: str = "model") -> Layout:
    """Where a profile's runtimes look for a model, or for one of two; elsewhere both have one file of data."""
    if profile.package != PACKAGE:
        return Layout(f"{part}.onnx", "model.onnx.safetensors")
    dtype = DTYPES.get(precision, precision)
    name = f"onnx/{part}{'' if dtype == 'fp32' else f'_{dtype}'}.onnx"
    return Layout(name, f"{name}_data")


def describe(folder: Path, profile: Profile, names: Collection[Layout], precision: str) -> None:
    """Tell transformers.js in config.json which models there are, and where their weights are."""
    if profile.package != PACKAGE:
        return
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    dtype = DTYPES.get(precision, precision)
    apart = {Path(name.model).name: 1 for name in names if (folder / name.data).is_file()}
    told: dict[str, Any] = {"dtype": dtype, "use_external_data_format": apart or False}
    if precision == "fp16":
        told["kv_cache_dtype"] = {"fp16": "float16"}
    config["transformers.js_config"] = told
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def keep_last(model: ir.Model) -> bool:
    """Let the model's head see the last `num_logits_to_keep` tokens alone, or all of them if that is 0.

    Returns:
        Whether there is a head: a product that the logits come from by way of elementwise operators. Without, the
        model stays as it is.
    """
    graph = model.graph
    head = _head(next((value for value in graph.outputs if value.name == "logits"), None))
    if head is None or head.inputs[0] is None:
        return False
    keep = ir.Value(name=KEEP, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    axes, ends = (_constant(f"{KEEP}/{name}", [value]) for name, value in (("axis", 1), ("end", 2**63 - 1)))
    zero = _constant(f"{KEEP}/first", [0])
    start = ir.node("Neg", [keep], name=f"{KEEP}/neg")
    starts = ir.node("Unsqueeze", [start.outputs[0], zero], name=f"{KEEP}/start")
    kept = ir.node("Slice", [head.inputs[0], starts.outputs[0], ends, axes], name=f"{KEEP}/slice")
    for node in (start, starts, kept):
        node.outputs[0].name = f"{node.name}/out"
        graph.insert_before(head, node)
    for constant in (axes, ends, zero):
        graph.register_initializer(constant)
    head.replace_input_with(0, kept.outputs[0])
    graph.inputs.append(keep)
    for value in graph.outputs:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape([value.shape[0], "kept_sequence_length", *value.shape[2:]])
    return True


def _head(logits: ir.Value | None) -> ir.Node | None:
    value = logits
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in _PRODUCTS:
            return node
        if node.op_type not in _THROUGH:
            return None
        # Of a sum or a product with a constant, the other operand is the one that is computed.
        value = next((given for given in node.inputs if given is not None and given.producer() is not None), None)
    return None


def _constant(name: str, values: list[int]) -> ir.Value:
    tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(values)]), const_value=tensor)
