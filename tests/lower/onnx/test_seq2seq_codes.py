"""Encoder-decoders in integers and half precision."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from benchmarks.zoo import graphs
from surgeon.lower.onnx import export
from surgeon.lower.onnx.pair import DECODER, ENCODER
from surgeon.lower.onnx.verify import verify
from tests.lower.onnx.test_seq2seq_bart import LORA, adapted


def test_int8_is_decided_linear_by_linear_in_both(tmp_path: Path) -> None:
    report = export.export_onnx(adapted(LORA), tmp_path / "onnx", precision="int8")
    assert report.token_agreement == 1.0
    assert {linear.bits for linear in report.linears} == {8}
    paths = {linear.path for linear in report.linears}
    assert {"model.encoder.layers.0.fc1", "model.decoder.layers.1.encoder_attn.k_proj", "lm_head"} <= paths
    for name in (ENCODER, DECODER):
        kinds = {node.op_type for node in ir.load(report.folder / f"{name}.onnx").graph}
        assert "MatMulNBits" in kinds
    assert verify(report.folder).token_agreement == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(("profile", "precision"), [("ort", "int4"), ("openvino", "int8"), ("ort", "fp16")])
def test_precisions(family: str, profile: str, precision: str, tmp_path: Path) -> None:
    graph = adapted(LORA, family=family)
    report = export.export_onnx(graph, tmp_path / "onnx", precision=precision, profile=profile)
    assert report.token_agreement == 1.0
    if precision == "fp16":
        inputs = ir.load(report.folder / f"{DECODER}.onnx").graph.inputs
        kinds = {value.dtype for value in inputs if value.name not in ("input_ids", "encoder_attention_mask")}
        assert kinds == {ir.DataType.FLOAT16}
    assert graphs.graph_of(family).task == "seq2seq-lm"
