"""BART as two models: adapters merged, transformers.js' layout, an embedding for both, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import safetensors.numpy
import torch

from benchmarks.zoo import graphs
from surgeon import halves, run
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.lower.onnx import export
from surgeon.lower.onnx.pair import DECODER, ENCODER
from surgeon.lower.onnx.verify import read_record, verify
from surgeon.passes import make
from surgeon.stream import StreamingExecutor
from tests.lower.onnx.conftest import traces
from tests.lower.onnx.test_seq2seq import ERROR, opened, texts

ROLES = "encoder,decoder,cross"
LORA = ("lora", {"rank": 4, "targets": "all-linear"})
PREFIX = ("prefix", {"tokens": 3, "sites": ROLES})
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("dora", {"rank": 4, "targets": "all-linear"}),
    "vera": ("vera", {"rank": 8, "targets": "all-linear"}),
    "ia3": ("ia3", {"targets": "all-linear"}),
    "loha": ("loha", {"rank": 2, "targets": "all-linear"}),
    "prefix-mlp": ("prefix", {"tokens": 3, "hidden": 6, "sites": ROLES}),
    "ptuning_v2": ("ptuning_v2", {"tokens": 3}),
    "prompt": ("prompt", {"tokens": 3, "init": "normal"}),
}
pytestmark = pytest.mark.usefixtures("lowered_once")


def adapted(*steps: tuple[str, dict[str, Any]], family: str = "bart") -> Graph:
    passes = [make(name, **options) for name, options in steps]
    return graphs.randomised(run.apply(graphs.graph_of(family), *passes), std=0.1)


def error_of(graph: Graph, folder: Path) -> float:
    """The largest difference of a padded batch from the graph in torch, relative to the largest logit."""
    pair = opened(folder)
    rows, given = texts(graph.config.vocab_size, pair.pad)
    ids, found = pair.decode(rows, [2], 6)
    target = torch.from_numpy(ids[:, :-1])
    given |= {halves.IDS: target, halves.MASK: torch.ones_like(target)}
    expected = StreamingExecutor(graph)(*(given[name] for name in graph.inputs))[0].numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def merged(lowered_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Graph, export.OnnxReport]:
    graph = adapted(LORA, PREFIX)
    return graph, export.export_onnx(graph, tmp_path_factory.mktemp("bart") / "onnx", weights="copy")


def test_adapters_of_weights_and_of_all_attentions_are_folded_in(merged: Any) -> None:
    graph, report = merged
    assert report.token_agreement == 1.0
    assert error_of(graph, report.folder) < ERROR
    assert error_of(graphs.graph_of("bart"), report.folder) > 1e-3
    assert [step["name"] for step in read_record(report.folder)["passes"]] == ["lora", "prefix"]


def test_what_both_have_is_written_once(merged: Any) -> None:
    folder = merged[1].folder
    written = safetensors.numpy.load_file(folder / "model.onnx.safetensors")
    assert [name for name, value in written.items() if value.shape == (112, 32)] == ["model.shared.weight"]
    both = [set(ir.load(folder / f"{name}.onnx").graph.initializers) for name in (ENCODER, DECODER)]
    assert set.intersection(*both) & set(written) == {"model.shared.weight"}


def test_the_layout_is_that_of_transformers_js(merged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged[0].config, "forced_bos_token_id", 7, raising=False)
    report = export.export_onnx(merged[0], tmp_path / "web", profile="web")
    models = [f"onnx/{name}.onnx" for name in (ENCODER, DECODER)]
    assert {*models, *(f"{name}_data" for name in models), "generation_config.json"} <= set(report.files)
    told = json.loads((report.folder / "config.json").read_text())["transformers.js_config"]
    assert told["use_external_data_format"] == {f"{ENCODER}.onnx": 1, f"{DECODER}.onnx": 1}
    assert read_record(report.folder)["first"] == [merged[0].config.decoder_start_token_id, 7]
    assert verify(report.folder).token_agreement == 1.0
    pair = opened(report.folder)
    assert "num_logits_to_keep" in [node.name for node in pair.decoder.get_inputs()]
    given = pair.encode([[5, 6, 7]])
    assert [pair.step(np.array([[2, 4, 5]]), given, keep=keep)[0].shape[1] for keep in (0, 1, 2)] == [3, 1, 2]
    assert traces(report.folder) == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"profile": "genai"}, UnsupportedError, "GenAI runs no encoder-decoder like bart"),
        ({"profile": "web", "demo": Path()}, UsageError, "the page is for causal language models"),
    ],
)
def test_what_has_no_place_is_refused_by_name(
    options: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        export.export_onnx(graphs.graph_of("bart"), tmp_path / "onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_rows_before_the_decoders_tokens_are_refused(tmp_path: Path) -> None:
    graph = adapted(("prompt", {"tokens": 3, "init": "normal", "side": "decoder"}))
    with pytest.raises(UnsupportedError, match="virtual tokens before the decoder's tokens have no constant keys"):
        export.export_onnx(graph, tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tmp_path: Path) -> None:
    graph = adapted(METHODS[method])
    report = export.export_onnx(graph, tmp_path / "onnx")
    assert report.token_agreement == 1.0
    assert error_of(graph, report.folder) < ERROR
