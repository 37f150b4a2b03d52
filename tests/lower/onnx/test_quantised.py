"""Quantised bases through ONNX Runtime: their weights stay in codes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

import surgeon
from benchmarks.zoo.folders import folder_of
from benchmarks.zoo.oracles import nudged


@pytest.mark.parametrize(
    ("method", "operator"),
    [("qa-lora", "MatMulNBits"), pytest.param("qlora", "MatMulBnb4", marks=pytest.mark.slow)],
)
def test_the_export_computes_what_the_quantised_model_does(method: str, operator: str, tmp_path: Path) -> None:
    options = {"group": 16} if method == "qa-lora" else {}
    nudged(surgeon.apply(folder_of("llama"), method, **{**options, "rank": 2}), 0.05).save(tmp_path / "work")
    report = surgeon.export(tmp_path / "work", tmp_path / "onnx", four_bit="bnb4")
    assert report.replay.token_agreement == 1
    assert report.replay.max_error <= report.replay.bound
    model = ir.load(tmp_path / "onnx" / "model.onnx")
    linears = len([name for name in surgeon.load(tmp_path / "work").graph.tensors if name.endswith(".codes")])
    assert [node.op_type for node in model.graph].count(operator) == linears
