"""OpenVINO reads an export whose weights are the checkpoint's own, and generates the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino

from benchmarks.zoo.folders import base_of
from surgeon.lower.onnx import export
from surgeon.lower.onnx.session import left_padded, numbered
from tests.lower.onnx.conftest import traces

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
"""Its default precision on CPUs with half-precision arithmetic is off by 3e-3."""


def generated(model: Any, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens of a batch padded on the left, and their logits, through the cache."""
    ids, mask = left_padded(prompts)
    sizes = {
        node.any_name: [size.get_length() if size.is_static else 0 for size in node.partial_shape]
        for node in model.inputs
    }
    past = {name: np.zeros((len(ids), *sizes[name][1:]), np.float32) for name in sizes if name.startswith("past_")}
    tokens, best = [], []
    for _ in range(steps):
        places = numbered(mask)[:, -ids.shape[1] :]
        found = model({"input_ids": ids, "attention_mask": mask, "position_ids": places, **past})
        logits = found["logits"][:, -1]
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        ids = logits.argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        tokens.append(ids[:, 0])
        best.append(logits.max(-1))
    return np.stack(tokens, 1).tolist(), np.stack(best, 1).tolist()


def test_the_tokens_are_those_of_the_replay(tmp_path: Path) -> None:
    report = export.export_onnx(base_of("llama")[1], tmp_path / "openvino", profile="openvino")
    assert report.weights.form == "bind"
    assert report.replay is not None
    file = report.folder / export.MODEL
    assert {node.domain for node in ir.load(file).graph} == {""}
    assert traces(report.folder) == []
    model = openvino.Core().compile_model(str(file), "CPU", EXACT)
    for batch in report.replay.batches:
        tokens, best = generated(model, batch.prompts, report.replay.steps)
        assert tokens == batch.tokens
        assert np.abs(np.array(best) - np.array(batch.best_logits)).max() <= report.replay.bound
