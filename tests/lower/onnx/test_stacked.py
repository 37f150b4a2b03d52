"""Mixed adapters in one batch: each row is what that adapter computes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.zoo.folders import base_of
from benchmarks.zoo.graphs import randomised
from surgeon import run
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.lower.onnx import adapter_file, adapter_slots, adapter_stack, adapters, check, export
from surgeon.passes import make
from tests.lower.onnx.test_adapter_file import expected_of, prompt

STEPS, ERROR = 4, 1e-5
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 3, "targets": "all-linear"}),
    ("dora", {"rank": 5}),
    ("ia3", {}),
]


def adapted() -> list[Graph]:
    """Adapters of three methods, of different ranks, at different linears."""
    base = base_of("llama")[1]
    return [randomised(run.apply(base, make(name, **options)), std=0.1) for name, options in METHODS]


def test_each_row_is_its_own_adapter(tmp_path: Path) -> None:
    options: dict[str, Any] = {"profile": "openvino", "adapters": "stacked", "verify": False}
    out = export.export_onnx(base_of("llama")[1], tmp_path / "onnx", **options).folder
    record, graphs = adapter_file.read_export(out), adapted()
    parts = [adapters.arrays(adapter_slots.compiled(graph, record)) for graph in graphs]
    file = tmp_path / "stack.safetensors"
    adapter_file.write(adapter_stack.stacked(parts, record), record, file)
    loaded = adapter_file.load(file, out)
    session = check.open_session(out / "model.onnx")
    order = (2, 0, 3, 1, 2)
    rows = prompt().repeat(len(order), 0)
    mixed = adapter_file.Loaded(loaded.inputs, {}, order)
    ids, _, found = check.decode(session, rows, np.ones_like(rows), STEPS, mixed)
    for row, number in enumerate(order):
        graph = ([base_of("llama")[1], *graphs])[number]
        expected = expected_of(graph, ids[row : row + 1])[:, :-1]
        assert np.abs(found[row] - expected).max() <= ERROR * np.abs(expected).max()
    assert len({tuple(row) for row in found[:, -1].round(3).tolist()}) == 4
    prefix = run.apply(base_of("llama")[1], make("prefix", tokens=2))
    with pytest.raises(UnsupportedError, match="keys and values before the text"):
        adapter_slots.compiled(prefix, record)


@pytest.mark.slow
def test_rows_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    """GPT-2's linears see all tokens of a batch in one row after another."""
    with pytest.raises(UnsupportedError, match="its rows are no texts"):
        export.export_onnx(base_of("gpt2")[1], tmp_path / "onnx", adapters="stacked", profile="openvino")
