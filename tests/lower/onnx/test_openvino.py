"""OpenVINO reads an export whose weights are the checkpoint's own, and generates the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import openvino

from benchmarks.zoo.folders import base_of
from surgeon.lower.onnx import export
from tests.lower.onnx.conftest import traces
from tests.lower.onnx.runtimes import EXACT, by_openvino


def test_the_tokens_are_those_of_the_replay(tmp_path: Path) -> None:
    report = export.export_onnx(base_of("llama")[1], tmp_path / "openvino", profile="openvino")
    assert report.weights.form == "bind"
    assert report.replay is not None
    file = report.folder / export.MODEL
    assert {node.domain for node in ir.load(file).graph} == {""}
    assert traces(report.folder) == []
    model = openvino.Core().compile_model(str(file), "CPU", EXACT)
    for batch in report.replay.batches:
        tokens, best = by_openvino(model, batch.prompts, report.replay.steps)
        assert tokens == batch.tokens
        assert np.abs(np.array(best) - np.array(batch.best_logits)).max() <= report.replay.bound
