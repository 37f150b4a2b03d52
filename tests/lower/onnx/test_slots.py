"""One graph, one session, any adapter: PEFT's own models are what every kind is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks.zoo import peft_kinds
from benchmarks.zoo.folders import base_of, folder_of, reference
from surgeon import run
from surgeon.errors import UnsupportedError, UsageError
from surgeon.lower.onnx import adapter_file, adapter_slots, adapters, check, export
from surgeon.lower.onnx.slots import Slots, named
from surgeon.passes import make

STEPS, ERROR = 6, 1e-5
Run = Callable[[Mapping[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose slots are required inputs, for every runtime that reads ONNX."""
    graph = base_of("llama")[1]
    out = tmp_path_factory.mktemp("slots") / "onnx"
    options: dict[str, Any] = {"profile": "openvino", "adapters": "slots", "verify": False}
    return export.export_onnx(graph, out, **options).folder


@pytest.fixture(scope="module")
def in_onnxruntime(exported: Path) -> Run:
    session = check.open_session(exported / export.MODEL)
    names = [node.name for node in session.get_outputs()]
    return lambda feed: dict(zip(names, session.run(None, dict(feed)), strict=True))


@pytest.fixture(scope="module")
def in_openvino(exported: Path) -> Run:
    import openvino

    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(str(exported / export.MODEL), "CPU", hints)
    return lambda feed: {o.get_any_name(): value for o, value in compiled(dict(feed)).items()}


@pytest.fixture(scope="module")
def record(exported: Path) -> dict[str, Any]:
    return adapter_file.read_export(exported)


def prompt(rows: int = 1) -> np.ndarray[Any, Any]:
    return torch.randint(3, 90, (rows, 5), generator=torch.Generator().manual_seed(3)).numpy()


def decoded(run: Run, slots: Mapping[str, Any], ids: Any, record: dict[str, Any]) -> tuple[Any, Any]:
    """The ids with what was generated, and all logits, through the cache."""
    shapes = [shape for name, shape in record["slots"]["inputs"].items() if name.startswith("prefix.")]
    empty = [np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for shape in shapes]
    layers = range(len(shapes) // 2)
    past = {
        f"past_key_values.{i}.{word}": value
        for (i, word), value in zip(((i, w) for i in layers for w in ("key", "value")), empty, strict=True)
    }
    logits, new = [], ids
    for _ in range(STEPS):
        length = ids.shape[1]
        places = np.arange(length)[None].repeat(len(ids), 0)[:, -new.shape[1] :]
        feed = {"input_ids": new, "attention_mask": np.ones((len(ids), length), np.int64), "position_ids": places}
        found = run({**feed, **past, **slots})
        past = {n.replace("present", "past_key_values"): v for n, v in found.items() if n != "logits"}
        logits.append(found["logits"])
        new = logits[-1][:, -1:].argmax(-1)
        ids = np.concatenate([ids, new], 1)
    return ids, np.concatenate(logits, 1)


def compared(run: Run, theirs: Any, slots: Mapping[str, Any], record: dict[str, Any]) -> float:
    """The largest |Δlogit| relative to the largest; the tokens are PEFT's greedy ones, or it raises."""
    ids, found = decoded(run, slots, prompt(), record)
    expected = peft_kinds.logits_of(theirs, torch.from_numpy(ids))[:, :-1].numpy()
    start = prompt().shape[1] - 1
    assert expected[:, start:].argmax(-1).tolist() == ids[:, start + 1 :].tolist()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def slots_of(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What a session is fed for the adapter of a folder."""
    tensors = adapters.arrays(adapter_slots.compiled(adapters.read(folder, None), record, str(folder)))
    return adapter_file.as_loaded(tensors, record).feed()


FEW = ("dora", "ia3", "prefix")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in FEW else pytest.mark.slow) for k in peft_kinds.KINDS]
)
def test_every_kind_computes_what_peft_does(
    kind: str, record: dict[str, Any], in_onnxruntime: Run, tmp_path: Path
) -> None:
    """All in one session, one after another; a prefix that a cache forgets is wrong from the second step on."""
    theirs = peft_kinds.made(reference(folder_of("llama")), kind, "llama", tmp_path / kind)
    assert compared(in_onnxruntime, theirs, slots_of(tmp_path / kind, record), record) < ERROR
    base = adapter_file.as_loaded({}, record).feed()
    assert compared(in_onnxruntime, reference(folder_of("llama")), base, record) < ERROR


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "dora" else pytest.mark.slow) for k in peft_kinds.KINDS]
)
def test_openvino_computes_the_same(kind: str, record: dict[str, Any], in_openvino: Run, tmp_path: Path) -> None:
    theirs = peft_kinds.made(reference(folder_of("llama")), kind, "llama", tmp_path / kind)
    assert compared(in_openvino, theirs, slots_of(tmp_path / kind, record), record) < ERROR
    base = adapter_file.as_loaded({}, record).feed()
    assert compared(in_openvino, reference(folder_of("llama")), base, record) < ERROR


def test_inputs_are_named_after_the_model(exported: Path, record: dict[str, Any]) -> None:
    inputs = {
        value.name: [str(size) for size in value.shape or ()] for value in ir.load(exported / "model.onnx").graph.inputs
    }
    path = "model.layers.1.self_attn.q_proj"
    assert inputs[f"{path}.lora_A"] == ["32", f"{path}.rank"]
    assert inputs[f"{path}.lora_B"] == [f"{path}.rank", "32"]
    assert inputs[f"{path}.in_scale"] == [f"{path}.in_scale.size"]
    assert f"{path}.out_shift" not in inputs
    assert inputs["prefix.0.key"] == ["1", "2", "prefix_length", "8"]
    assert "lm_head.lora_A" not in inputs
    slots = [name for name in inputs if name in record["slots"]["inputs"]]
    assert len(slots) == len(record["slots"]["inputs"]) == 4 * (7 * 4 + 2)
    outputs = {
        value.name: [str(size) for size in value.shape or ()]
        for value in ir.load(exported / "model.onnx").graph.outputs
    }
    assert outputs["present.0.key"] == ["batch_size", "2", "total_sequence_length", "8"]


def test_an_adapter_that_is_still_zero_has_all_its_slots(record: dict[str, Any]) -> None:
    """Equal initialisers are merged by exporters; inputs are not."""
    graph = run.apply(base_of("llama")[1], make("lora", rank=4, targets="all-linear"))
    tensors = adapter_slots.compiled(graph, record)
    assert len(tensors) == 2 * 7 * 4
    assert all(bool((value == 0).all()) for name, value in tensors.items() if name.endswith("lora_B"))


def test_equal_layers_stay_one() -> None:
    graph = run.apply(base_of("llama")[1], Slots())
    assert len(graph.groups()) == 1
    assert len(named(graph)) == 4 * (7 * 4 + 2)
    small = run.apply(base_of("llama")[1], Slots(targets="q_proj", prefix=False))
    assert len(named(small)) == 4 * 4


def test_what_has_no_slots_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean"):
        export.export_onnx(base_of("llama")[1], tmp_path / "out", adapters="slts")
    with pytest.raises(UnsupportedError, match="stacked adapters are for models that generate"):
        export.export_onnx(base_of("bert")[1], tmp_path / "out", adapters="stacked")
    with pytest.raises(UsageError, match="q_prj"):
        export.export_onnx(base_of("llama")[1], tmp_path / "out", adapters="slots", targets="q_prj")
    assert list(tmp_path.iterdir()) == []
