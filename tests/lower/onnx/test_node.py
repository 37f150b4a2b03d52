"""The web profile's slots in onnxruntime-node, installed from npm: every method swapped in one session."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.zoo.folders import base_of
from surgeon.lower.onnx import adapter_file, export
from tests.lower.onnx.test_adapter_file import METHODS, adapted, expected_of, prompt, tensors_of

STEPS = 8


@pytest.mark.slow
def test_node_swaps_every_method(tmp_path: Path) -> None:
    options: dict[str, Any] = {"profile": "web", "adapters": "slots", "verify": False}
    out = export.export_onnx(base_of("llama")[1], tmp_path / "web", **options).folder
    record = adapter_file.read_export(out)
    adapter_file.write({}, record, tmp_path / "base.safetensors")
    for method in METHODS:
        adapter_file.write(tensors_of(adapted(method), record), record, tmp_path / f"{method}.safetensors")
    install = ["npm", "install", "--no-audit", "--no-fund", "onnxruntime-node@1.30"]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True)
    names = ["base", *METHODS, "base"]
    ids = ",".join(str(int(token)) for token in prompt()[0])
    script, files = Path(__file__).with_name("decode.mjs"), [f"{name}.safetensors" for name in names]
    command = ["node", str(script), str(out / "onnx" / "model.onnx"), ids, str(STEPS), *files]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(names)
    start = prompt().shape[1]
    for name, row in zip(names, rows, strict=True):
        graph = base_of("llama")[1] if name == "base" else adapted(name)
        expected = expected_of(graph, np.array([row]))[0, start - 1 : -1]
        assert expected.argmax(-1).tolist() == row[start:], name
