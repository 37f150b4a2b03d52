"""The web profile: transformers.js finds what it looks for, and the same tokens come out of node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.zoo.folders import base_of
from benchmarks.zoo.graphs import graph_of
from surgeon.lower.onnx import export, web
from surgeon.lower.onnx import session as ort
from surgeon.lower.onnx.profiles import PROFILES
from tests.lower.onnx.conftest import traces


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> export.OnnxReport:
    graph = base_of("llama-tied")[1]
    return export.export_onnx(graph, tmp_path_factory.mktemp("web") / "web", profile="web")


def test_the_layout_is_that_of_transformers_js(exported: export.OnnxReport) -> None:
    assert set(exported.files) == {
        "config.json", "generation_config.json", "surgeon.json", "onnx/model.onnx", "onnx/model.onnx_data",
    }  # fmt: skip
    assert exported.weights.form == "copy"
    assert "the profile web" in exported.weights.note
    told = json.loads((exported.folder / "config.json").read_text())["transformers.js_config"]
    assert told == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    names = [web.layout(PROFILES["web"], precision).model for precision in ("fp32", "fp16", "int8", "int4")]
    assert names == [f"onnx/model{suffix}.onnx" for suffix in ("", "_fp16", "_int8", "_q4")]
    record = json.loads((exported.folder / export.MANIFEST).read_text())
    assert record["model"] == "onnx/model.onnx"
    assert exported.token_agreement == 1.0


def test_only_standard_operators_and_the_names_of_sizes(exported: export.OnnxReport) -> None:
    graph = ir.load(exported.folder / "onnx/model.onnx").graph
    assert {node.domain for node in graph} == {""}
    shapes = {value.name: [str(size) for size in value.shape or ()] for value in graph.inputs}
    assert shapes["past_key_values.0.key"] == ["batch_size", "2", "past_sequence_length", "8"]
    assert shapes[web.KEEP] == []


def test_the_head_sees_as_many_tokens_as_are_asked_for(exported: export.OnnxReport) -> None:
    session = ort.open_session(exported.folder / "onnx/model.onnx")
    ids = np.arange(3, 15, dtype=np.int64).reshape(2, 6)
    ones = np.ones_like(ids)
    feed: dict[str, Any] = {"input_ids": ids, "attention_mask": ones, "position_ids": ort.numbered(ones)}
    feed |= ort.empty_cache(session, 2)
    found = [session.run(["logits"], {**feed, web.KEEP: np.array(count, np.int64)})[0] for count in (0, 1, 2, 99)]
    assert [logits.shape[1] for logits in found] == [6, 1, 2, 6]
    assert np.array_equal(found[0], found[3])
    assert np.abs(found[0][:, -2:] - found[2]).max() < 1e-5
    assert np.abs(found[0][:, -1:] - found[1]).max() < 1e-5


def test_no_file_tells_where_it_was_made(exported: export.OnnxReport) -> None:
    assert traces(exported.folder) == []


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence-classification"), ("distilbert", "features")])
def test_what_is_run_once_chooses_no_tokens(family: str, task: str, tmp_path: Path) -> None:
    made = export.export_onnx(graph_of(family, task), tmp_path / "web", profile="web")
    assert [value.name for value in ir.load(made.folder / "onnx/model.onnx").graph.inputs][:1] == ["input_ids"]
    assert web.KEEP not in {value.name for value in ir.load(made.folder / "onnx/model.onnx").graph.inputs}
    assert made.replay is not None
    assert made.replay.max_error < 1e-4
