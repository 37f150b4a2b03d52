"""Quantised bases through ONNX Runtime: their weights are written as what the codes stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgeon
from benchmarks.zoo.folders import folder_of
from benchmarks.zoo.oracles import nudged


@pytest.mark.parametrize("method", ["qlora", pytest.param("qa-lora", marks=pytest.mark.slow)])
def test_the_export_computes_what_the_quantised_model_does(method: str, tmp_path: Path) -> None:
    options = {"group": 16} if method == "qa-lora" else {}
    nudged(surgeon.apply(folder_of("llama"), method, **{**options, "rank": 2}), 0.05).save(tmp_path / "work")
    report = surgeon.export(tmp_path / "work", tmp_path / "onnx")
    assert report.replay.token_agreement == 1
    assert report.replay.max_error <= report.replay.bound
