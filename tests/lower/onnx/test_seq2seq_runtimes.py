"""Encoder-decoders of every family the capture cuts in two, and in the runtimes that their profiles are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from transformers import CONFIG_MAPPING

from benchmarks.zoo import build, graphs
from benchmarks.zoo.shrink import shrink
from surgeon.errors import UnsupportedError
from surgeon.lower.onnx import export, prepack
from surgeon.lower.onnx.pair import DECODER, ENCODER
from surgeon.lower.onnx.verify import verify
from tests.lower.onnx.runtimes import EXACT, TRANSFORMERS_JS, node, npm
from tests.lower.onnx.test_seq2seq import ERROR, error_against_transformers, generated, opened, texts

pytestmark = pytest.mark.slow
FAMILIES = ("mbart", "marian", "pegasus", "mt5", "umt5", "blenderbot", "blenderbot-small", "mvp", "plbart")
STEPS = 8


def tiny(kind: str) -> Any:
    """A random model of an architecture, two layers on either side."""
    config = CONFIG_MAPPING[kind]
    fields = shrink(config().to_dict())
    fields |= {name: 2 for name in fields if name in ("encoder_layers", "decoder_layers", "num_layers")}
    fields |= {name: 2 for name in fields if name in ("num_decoder_layers", "num_hidden_layers")}
    dropped = ("transformers_version", "model_type", "architectures", "_name_or_path", "id2label", "label2id")
    return build.build(config(**{name: value for name, value in fields.items() if name not in dropped}), "seq2seq-lm")


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    report = export.export_onnx(graphs.graph_over(model, model.config, "seq2seq-lm"), tmp_path / "onnx")
    assert report.token_agreement == 1.0
    assert error_against_transformers(model, opened(report.folder)) < ERROR


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bart"])
def test_two_layers_and_prepacked(family: str, tmp_path: Path) -> None:
    report = export.export_onnx(graphs.graph_of(family), tmp_path / "onnx")
    assert error_against_transformers(graphs.model_of(family), opened(report.folder)) < ERROR
    made = prepack.prepack(report.folder, tmp_path / "here")
    assert {f"{name}.onnx" for name in (ENCODER, DECODER)} <= set(made.files)
    assert "model.onnx.safetensors" not in made.files
    assert verify(tmp_path / "here").token_agreement == 1.0


def test_blocks_of_tokens_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny("longt5")
    with pytest.raises(UnsupportedError, match="blocks of tokens") as failed:
        export.export_onnx(graphs.graph_over(model, model.config, "seq2seq-lm"), tmp_path / "onnx")
    assert "encoder.block.0" in str(failed.value)
    assert not list(tmp_path.iterdir())


def test_positions_that_are_counted_in_the_ids_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny("m2m_100")
    with pytest.raises(UnsupportedError, match="m2m_100 carries state from token to token"):
        export.export_onnx(graphs.graph_over(model, model.config, "seq2seq-lm"), tmp_path / "onnx")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_transformers_js_generates_what_transformers_does(family: str, tmp_path: Path) -> None:
    graph = graphs.graph_of(family)
    out = export.export_onnx(graph, tmp_path / "web", profile="web").folder
    rows, tokens = texts(graph.config.vocab_size, pad := graph.config.pad_token_id or 0)
    npm(tmp_path, TRANSFORMERS_JS)
    sources = [",".join(map(str, row)) for row in rows]
    found = node("translate.mjs", tmp_path, out, STEPS, pad, *sources)
    assert json.loads(found[-1]) == generated(graphs.model_of(family), tokens, STEPS)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_openvino_computes_the_replay(family: str, tmp_path: Path) -> None:
    report = export.export_onnx(graphs.graph_of(family), tmp_path / "onnx", profile="openvino")
    assert report.replay is not None
    core = openvino.Core()
    encoder, decoder = (
        core.compile_model(str(report.folder / f"{name}.onnx"), "CPU", EXACT) for name in (ENCODER, DECODER)
    )
    pair = opened(report.folder)
    batch = report.replay.batches[1]
    given = pair.encode(batch.prompts)
    rows, pad = batch.prompts, pair.pad
    length = max(map(len, rows))
    ids = np.array([row + [pad] * (length - len(row)) for row in rows])
    states = encoder({"input_ids": ids, "attention_mask": given["encoder_attention_mask"]})["last_hidden_state"]
    assert np.abs(states - given["encoder_hidden_states"]).max() < 1e-4
    new = np.array([json.loads((report.folder / "surgeon.json").read_text())["first"]] * len(rows))
    for step, wanted in enumerate(np.array(batch.best_logits).T):
        found = decoder({**given, "input_ids": new})
        given |= {name: found[name.replace("past_key_values", "present")] for name in given if "past" in name}
        new = np.array(batch.tokens)[:, step : step + 1]
        best = np.take_along_axis(found["logits"][:, -1], new, -1)[:, 0]
        assert np.abs(best - wanted).max() <= report.replay.bound
