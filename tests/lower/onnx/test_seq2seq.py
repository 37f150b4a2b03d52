"""T5 as two models: what transformers generates, padded texts, keys and values of the encoder's states once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks.zoo import build, families
from surgeon.errors import CheckFailed
from surgeon.graph import Graph
from surgeon.lower.onnx import export
from surgeon.lower.onnx import verify as later
from surgeon.lower.onnx.pair import DECODER, ENCODER, Pair, open_record
from surgeon.source import open_graph, open_source
from tests.lower.onnx.conftest import traces
from tests.lower.onnx.test_verify import alone

ERROR = 1e-5  # relative to the largest logit: fp32 arithmetic in another order
STEPS = 12
PADDING = (0, 4, 2)
FILES = {f"{ENCODER}.onnx", f"{DECODER}.onnx", "weights/model.safetensors"}
CACHE = [f"past_key_values.0.{side}.{word}" for side in ("decoder", "encoder") for word in ("key", "value")]


def small(folder: Path) -> tuple[Any, Graph]:
    """A T5 of one layer on either side, on disk."""
    config = families.tiny_config("t5")
    config.num_layers = config.num_decoder_layers = 1
    model = build.build(config, "seq2seq-lm")
    return model, open_graph(open_source(build.save(model, folder)))


def texts(vocabulary: int, pad: int) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """Three texts of different lengths, and the same padded on the right."""
    ids = torch.randint(3, vocabulary, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDING):
        mask[row, 9 - count :] = 0
    rows = [ids[row, : 9 - count].tolist() for row, count in enumerate(PADDING)]
    return rows, {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}


def opened(folder: Path) -> Pair:
    return open_record(folder, later.read_record(folder))


def generated(model: Any, tokens: dict[str, torch.Tensor], steps: int = STEPS) -> list[list[int]]:
    """transformers' own greedy tokens."""
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "num_beams": 1, "do_sample": False}
    return model.generate(**tokens, **options, forced_eos_token_id=None).tolist()


def error_against_transformers(model: Any, pair: Pair, pieces: tuple[int, ...] = (3, 1, 1, 2)) -> float:
    """The largest difference of a padded batch whose targets are given in pieces, relative to the largest logit."""
    rows, tokens = texts(model.config.vocab_size, pair.pad)
    target = torch.randint(3, model.config.vocab_size, (3, sum(pieces)), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(**tokens, decoder_input_ids=target).logits.numpy()
    given, found, start = pair.encode(rows), [], 0
    for piece in pieces:
        logits, given = pair.step(target[:, start : start + piece].numpy(), given)
        found.append(logits)
        start += piece
    return float(np.abs(np.concatenate(found, 1) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def t5(lowered_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Graph, export.OnnxReport]:
    root = tmp_path_factory.mktemp("t5")
    model, graph = small(root / "model")
    return model, graph, export.export_onnx(graph, root / "onnx")


def test_pieces_of_a_padded_batch_equal_transformers(t5: Any) -> None:
    assert error_against_transformers(t5[0], opened(t5[2].folder)) < ERROR


def test_greedy_tokens_are_those_of_transformers(t5: Any) -> None:
    pair = opened(t5[2].folder)
    rows, tokens = texts(t5[1].config.vocab_size, pair.pad)
    ids, _ = pair.decode(rows, later.read_record(t5[2].folder)["first"], STEPS)
    assert ids.tolist() == generated(t5[0], tokens)
    assert pair.decode(rows[2:], [0], STEPS)[0].tolist() == ids[2:].tolist()


def test_the_states_are_read_in_the_first_call_alone(t5: Any) -> None:
    pair = opened(t5[2].folder)
    given = pair.encode([[5, 6, 7, 8], [9, 10]])
    _, given = pair.step(np.array([[0], [0]]), given)
    spoilt = {**given, "encoder_hidden_states": np.full_like(given["encoder_hidden_states"], np.nan)}
    (right, after), (found, _) = (pair.step(np.array([[4], [3]]), one) for one in (given, spoilt))
    assert np.array_equal(found, right)
    assert np.array_equal(after[CACHE[2]], given[CACHE[2]])
    assert given[CACHE[2]].shape == (2, 4, 4, 12)


def test_names_and_dimensions_are_those_of_optimum(t5: Any) -> None:
    encoder, decoder = (ir.load(t5[2].folder / f"{name}.onnx").graph for name in (ENCODER, DECODER))
    assert [value.name for value in encoder.inputs] == ["input_ids", "attention_mask"]
    assert [value.name for value in encoder.outputs] == ["last_hidden_state"]
    names = {"input_ids", "encoder_attention_mask", "encoder_hidden_states", *CACHE}
    assert {value.name for value in decoder.inputs} == names
    present = [name.replace("past_key_values", "present") for name in CACHE]
    assert [value.name for value in decoder.outputs] == ["logits", *present]
    shapes = {value.name: [str(size) for size in value.shape or ()] for value in (*decoder.inputs, *decoder.outputs)}
    assert shapes["encoder_hidden_states"] == ["batch_size", "encoder_sequence_length", "32"]
    assert shapes[CACHE[0]] == ["batch_size", "4", "past_sequence_length", "12"]
    assert shapes[CACHE[2]] == ["batch_size", "4", "past_encoder_sequence_length", "12"]
    assert shapes[present[2]] == ["batch_size", "4", "encoder_sequence_length", "12"]


def test_the_replay_is_in_the_manifest(t5: Any) -> None:
    report = t5[2]
    record = json.loads((report.folder / export.MANIFEST).read_text())
    assert (record["encoder"], record["model"]) == (f"{ENCODER}.onnx", f"{DECODER}.onnx")
    assert record["first"] == [t5[1].config.decoder_start_token_id]
    single, padded = record["verified"]["batches"]
    assert len(single["prompts"]) == 1
    assert len({len(prompt) for prompt in padded["prompts"]}) == 3
    assert all(len(row) == 20 for row in single["tokens"] + padded["tokens"])
    assert 0 < report.max_error < report.bound
    assert (report.attention, len(next(iter(report.fallbacks.values())))) == ("standard", 3)


def test_both_read_the_checkpoints_own_bytes_and_tell_no_path(t5: Any) -> None:
    report, graph = t5[2], t5[1]
    assert set(report.files) == {*FILES, "config.json", "generation_config.json", "surgeon.json"}
    parameters = sum(spec.count for spec in graph.tensors.values()) * 4
    assert (report.weights.form, report.weights.bound, report.weights.written) == ("bind", parameters, 0)
    assert traces(report.folder) == []


def test_later_with_onnxruntime_alone_it_computes_what_it_did(t5: Any) -> None:
    done = alone("verify", str(t5[2].folder), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["token_agreement"], found["probes"]) == (True, 1.0, 4)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_wrong_half_is_caught_and_nothing_is_left(
    part: str, t5: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = export.build

    def wrong(*args: Any, **options: Any) -> ir.Model:
        model = right(*args, **options)
        for name, value in list(model.graph.initializers.items()):
            if name.startswith(part) and "DenseReluDense.wo" in name and value.const_value is not None:
                value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.1))
                value.name = f"{name}.wrong"  # no tensor of the checkpoint's
        return model

    monkeypatch.setattr(export, "build", wrong)
    with pytest.raises(CheckFailed, match="ONNX Runtime computes something else"):
        export.export_onnx(t5[1], tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
