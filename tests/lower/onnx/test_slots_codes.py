"""Slots beside weights in codes: the base stays quantised, the adapter stays apart, and both are proven."""

from __future__ import annotations

import json
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
def test_the_adapter_of_a_quantised_base_is_swapped(method: str, operator: str, tmp_path: Path) -> None:
    """A QA-LoRA's groups are rows of lora_A that are equal."""
    options = {"group": 16} if method == "qa-lora" else {}
    nudged(surgeon.apply(folder_of("llama"), method, **{**options, "rank": 2}), 0.05).save(tmp_path / "tuned")
    out = tmp_path / "onnx"
    report = surgeon.export(tmp_path / "tuned", out, four_bit="bnb4", adapters="slots")
    assert report.token_agreement == 1
    record = json.loads((out / "surgeon.json").read_text())
    (adapter,) = record["adapters"]
    assert (adapter["file"], adapter["verified"]["token_agreement"]) == ("adapters/work.onnx_adapter", 1.0)
    assert record["base"]["codes"] != []
    base, own = (entry["verified"]["batches"][0]["best_logits"] for entry in (record, adapter))
    assert base != own
    model = ir.load(out / "model.onnx")
    linears = len([name for name in surgeon.load(tmp_path / "tuned").graph.tensors if name.endswith(".codes")])
    assert [node.op_type for node in model.graph].count(operator) == linears
