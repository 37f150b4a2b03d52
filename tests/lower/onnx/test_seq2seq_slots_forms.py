"""Slots of encoder-decoders: T5's position biases, every profile and precision, stacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino
import pytest
import torch

from benchmarks.zoo.folders import base_of
from benchmarks.zoo.graphs import randomised
from surgeon import halves
from surgeon.errors import UnsupportedError
from surgeon.lower.onnx import adapter_file, adapter_slots, adapter_stack, adapters
from surgeon.lower.onnx.pair import open_record
from surgeon.lower.onnx.scalars import unshare
from surgeon.lower.onnx.slots import Slots, named
from surgeon.lower.onnx.verify import verify
from surgeon.passes import make
from surgeon.run import apply
from surgeon.stream import StreamingExecutor
from tests.lower.onnx.runtimes import EXACT
from tests.lower.onnx.test_seq2seq import ERROR, texts
from tests.lower.onnx.test_seq2seq_slots import STEPS, adapted, slotted


def test_t5s_position_biases_see_a_prefix_of_either_side() -> None:
    """Its layers have biases of their own and of others; in torch, no length being that of another role."""
    base = base_of("t5")[1]
    lengths = {"encoder": 2, "decoder": 3, "cross": 4}
    steps = [make("prefix", tokens=count, sites=role, biased=True) for role, count in lengths.items()]
    graph = randomised(apply(base, *steps), std=0.5)
    slots = apply(base, Slots(targets="SelfAttention.q"))
    inputs: dict[str, list[int]] = {name: [] for name in named(slots)}
    record = {
        "base": adapter_slots.described(base),
        "slots": {"inputs": inputs, "prefix": "slots", "dtype": "float32"},
    }
    values = adapter_slots.compiled(graph, record)
    assert {name.split(".")[2]: value.shape[2] for name, value in values.items()} == lengths
    given: dict[str, Any] = {name: torch.ones(1) for name in inputs}
    given |= {name: torch.zeros(32, 0) for name in inputs if name.endswith("lora_A")}
    given |= {name: torch.zeros(0, 48) for name in inputs if name.endswith("lora_B")}
    given |= values
    rows, tokens = texts(base.config.vocab_size, 0)
    target = torch.randint(3, 90, (len(rows), 5), generator=torch.Generator().manual_seed(4))
    given |= {**tokens, halves.IDS: target, halves.MASK: torch.ones_like(target)}
    every = (StreamingExecutor(one)(*(given[name] for name in one.inputs))[0] for one in (slots, graph, base))
    found, expected, plain = every
    assert (found - expected).abs().max() <= ERROR * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()


def test_choices_do_not_share_a_number() -> None:
    """OpenVINO compiles no attention whose mask and whose guard of empty rows read one 0."""
    x, zero = ir.val("x", ir.DataType.FLOAT, [2]), ir.val("zero", const_value=ir.tensor(np.float32(0), name="zero"))
    seen = ir.val("seen", ir.DataType.BOOL, [2])
    nodes = [ir.node("Where", [seen, x, zero], name=name) for name in ("mask", "guard")]
    graph = ir.Graph([x, seen], [node.outputs[0] for node in nodes], nodes=nodes, initializers=[zero])
    unshare(ir.Model(graph, ir_version=10))
    found = [node.inputs[2] for node in nodes]
    assert len({value.name for value in found if value is not None}) == 2
    assert [float(value.const_value.numpy()) for value in found if value and value.const_value] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["ort", "web", "openvino"])
def test_t5(profile: str, lowered_once: None, tmp_path: Path) -> None:
    given = {name: adapted(name, "t5", "all-linear") for name in ("dora", "prefix", "prefix-mlp")}
    out = slotted("t5", tmp_path / "onnx", profile=profile, given=given)
    record, told = adapter_file.read_export(out), json.loads((out / "surgeon.json").read_text())
    assert record["slots"]["optional"] is (profile == "ort")
    assert [entry["verified"]["token_agreement"] for entry in told["adapters"]] == [1.0] * 3
    assert verify(out).token_agreement == 1.0
    if profile == "ort":
        return
    loaded, pair = adapter_file.load(out / "adapters" / "dora.safetensors", out), open_record(out, told)
    assert set(loaded.inputs) == set(record["slots"]["inputs"])
    for session, names in zip((pair.encoder, pair.decoder), record["slots"]["parts"].values(), strict=True):
        assert set(names) < {node.name for node in session.get_inputs()}


@pytest.mark.slow
def test_openvino_computes_the_same_with_an_adapter(tmp_path: Path) -> None:
    graph = adapted("prefix", "t5")
    out = slotted("t5", tmp_path / "onnx", profile="openvino", given={"mine": graph}, targets="wo")
    record, told = adapter_file.read_export(out), json.loads((out / "surgeon.json").read_text())
    loaded, pair = adapter_file.load(out / "adapters" / "mine.safetensors", out), open_record(out, told)
    first = replace(pair, given=loaded).encode([[5, 6, 7], [9, 4]])
    expected = replace(pair, given=loaded).step(np.array([[0, 8], [0, 3]]), first)[0]
    core = openvino.Core()
    encoder, decoder = (core.compile_model(str(out / told[word]), "CPU", EXACT) for word in ("encoder", "model"))
    parts = [{name: loaded.inputs[name] for name in names} for names in record["slots"]["parts"].values()]
    ids = np.array([[5, 6, 7], [9, 4, pair.pad]])
    states = encoder({"input_ids": ids, "attention_mask": first["encoder_attention_mask"], **parts[0]})
    given = {**first, "encoder_hidden_states": states["last_hidden_state"], "input_ids": np.array([[0, 8], [0, 3]])}
    found = decoder({**given, **parts[1]})["logits"]
    assert np.abs(found - expected).max() <= ERROR * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_beside_integers_and_in_half_precision(precision: str, tmp_path: Path) -> None:
    out = slotted("bart", tmp_path / "onnx", precision=precision, given={"dora": adapted("dora", targets="all-linear")})
    (entry,) = json.loads((out / "surgeon.json").read_text())["adapters"]
    assert entry["verified"]["token_agreement"] == 1.0
    assert (entry["verified"]["unrounded"] is None) is (precision == "fp16")
    assert verify(out).token_agreement == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_stacked_each_row_is_its_own_adapter(family: str, tmp_path: Path) -> None:
    out = slotted(family, tmp_path / "onnx", adapters="stacked", profile="openvino")
    record = adapter_file.read_export(out)
    graphs = [adapted(name, family, "all-linear") for name in ("dora", "lora", "ia3")]
    parts = [adapters.arrays(adapter_slots.compiled(graph, record)) for graph in graphs]
    adapter_file.write(adapter_stack.stacked(parts, record), record, tmp_path / "stack.safetensors")
    loaded = adapter_file.load(tmp_path / "stack.safetensors", out)
    pair = open_record(out, json.loads((out / "surgeon.json").read_text()))
    rows, given = texts(base_of(family)[1].config.vocab_size, pair.pad)
    order = (2, 0, 3)
    ids, found = replace(pair, given=replace(loaded, ids=order)).decode(rows, [2], STEPS)
    target = torch.from_numpy(ids[:, :-1])
    given |= {halves.IDS: target, halves.MASK: torch.ones_like(target)}
    for row, number in enumerate(order):
        graph = ([base_of(family)[1], *graphs])[number]
        expected = StreamingExecutor(graph)(*(given[name] for name in graph.inputs))[0].numpy()
        assert np.abs(found[row] - expected[row]).max() <= ERROR * np.abs(expected).max()
    with pytest.raises(UnsupportedError, match="keys and values before the text"):
        adapter_slots.compiled(adapted("prefix", family), record)
