"""The web profile's slots in onnxruntime-node, installed from npm: every method swapped in one session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.zoo.folders import base_of
from surgeon.lower.onnx import adapter_file, export
from tests.lower.onnx.runtimes import node, npm
from tests.lower.onnx.test_adapter_file import METHODS, adapted, expected_of, prompt, tensors_of

STEPS = 8


@pytest.mark.slow
@pytest.mark.parametrize("opset", [21, 23])
def test_node_swaps_every_method(opset: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"profile": "web", "adapters": "slots", "verify": False, "opset": opset}
    out = export.export_onnx(base_of("llama")[1], tmp_path / "web", **options).folder
    record = adapter_file.read_export(out)
    adapter_file.write({}, record, tmp_path / "base.safetensors")
    for method in METHODS:
        adapter_file.write(tensors_of(adapted(method), record), record, tmp_path / f"{method}.safetensors")
    npm(tmp_path, "onnxruntime-node@1.30")
    names = ["base", *METHODS, "base"]
    ids = ",".join(str(int(token)) for token in prompt()[0])
    files = [f"{name}.safetensors" for name in names]
    found = node("decode.mjs", tmp_path, out / "onnx" / "model.onnx", ids, STEPS, *files)
    rows = [json.loads(line) for line in found]
    assert len(rows) == len(names)
    start = prompt().shape[1]
    for name, row in zip(names, rows, strict=True):
        graph = base_of("llama")[1] if name == "base" else adapted(name)
        expected = expected_of(graph, np.array([row]))[0, start - 1 : -1]
        assert expected.argmax(-1).tolist() == row[start:], name
