"""Adapters as files: swapped in one session of ONNX Runtime and GenAI, and refused before they are written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from benchmarks.zoo.folders import base_of, folder_of
from benchmarks.zoo.graphs import randomised
from surgeon import fold, run
from surgeon.errors import CheckFailed, UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.lower.onnx import adapter_file, adapter_slots, adapters, check, export
from surgeon.passes import make
from surgeon.replaced import Held
from surgeon.stream import StreamingExecutor
from surgeon.verification import make_probes
from tests.lower.onnx.runtimes import by_genai

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 3, "targets": "all-linear"}),
    "rslora": ("lora", {"rank": 4, "rslora": True}),
    "dora": ("dora", {"rank": 2}),
    "dylora": ("dylora", {"rank": 4}),
    "adalora": ("adalora", {}),
    "vera": ("vera", {"rank": 5}),
    "ia3": ("ia3", {}),
    "loha": ("loha", {"rank": 2}),
    "prefix": ("prefix", {"tokens": 3}),
    "ptuning_v2": ("ptuning_v2", {"tokens": 2}),
    "prompt": ("prompt", {"tokens": 4, "init": "normal"}),
}
FEW, STEPS, ERROR = ("dora", "prompt"), 6, 1e-5
EACH = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in METHODS]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama for GenAI with optional slots, prefixes among them."""
    options: dict[str, Any] = {
        "profile": "genai",
        "prefix_slots": True,
        "adapters": "slots",
        "verify": False,
        "weights": "copy",
    }
    return export.export_onnx(base_of("llama")[1], tmp_path_factory.mktemp("file") / "onnx", **options).folder


@pytest.fixture(scope="module")
def session(exported: Path) -> onnxruntime.InferenceSession:
    return check.open_session(exported / "model.onnx")


@pytest.fixture(scope="module")
def record(exported: Path) -> dict[str, Any]:
    return adapter_file.read_export(exported)


def adapted(method: str) -> Graph:
    """The base with a method whose values were drawn."""
    name, options = METHODS[method]
    return randomised(run.apply(base_of("llama")[1], make(name, **options)), std=0.1)


def tensors_of(graph: Graph, record: dict[str, Any]) -> dict[str, Any]:
    return adapters.arrays(adapter_slots.compiled(graph, record))


def prompt() -> Any:
    return torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(2)).numpy()


def expected_of(graph: Graph, ids: Any) -> Any:
    """The logits of a text in torch, the adapter not folded in."""
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
    return StreamingExecutor(graph)(*(torch.from_numpy(given[name]) for name in graph.inputs))[0].numpy()


class Activated:
    """A session that runs with an adapter active, as applications do it."""

    def __init__(self, session: Any, file: Path) -> None:
        self.session, self.options, self.adapter = session, onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
        self.adapter.Load(str(file))
        self.options.add_active_adapter(self.adapter)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run(self, outputs: Any, feed: Any) -> Any:
        return self.session.run(outputs, feed, self.options)


def agreed(session: Any, graph: Graph) -> list[int]:
    """The greedy tokens, which are torch's, with the same logits at every step."""
    ids, _, found = check.decode(session, prompt(), np.ones_like(prompt()), STEPS)
    expected = expected_of(graph, ids)[:, :-1]
    assert np.abs(found - expected).max() <= ERROR * np.abs(expected).max()
    start = prompt().shape[1] - 1
    assert expected[:, start:].argmax(-1).tolist() == ids[:, start + 1 :].tolist()
    return [int(token) for token in ids[0, start + 1 :]]


@pytest.mark.parametrize("method", EACH)
def test_every_method_is_swapped_in_one_session(
    method: str, session: Any, exported: Path, record: dict[str, Any], tmp_path: Path
) -> None:
    """In ONNX Runtime by its own adapters; between two of them the session is the base's again."""
    file = tmp_path / "x.onnx_adapter"
    graph = adapted(method)
    adapter_file.write(tensors_of(graph, record), record, file)
    tokens = agreed(Activated(session, file), graph)
    agreed(session, base_of("llama")[1])
    loaded = adapter_file.load(file, exported)
    ids = check.decode(session, prompt(), np.ones_like(prompt()), STEPS, loaded)[0]
    assert ids[0, prompt().shape[1] :].tolist() == tokens


@pytest.mark.parametrize("method", EACH)
def test_genai_swaps_them_too(method: str, exported: Path, record: dict[str, Any], tmp_path: Path) -> None:
    import onnxruntime_genai as og

    file, graph = tmp_path / "x.onnx_adapter", adapted(method)
    adapter_file.write(tensors_of(graph, record), record, file)
    model: Any = og.Model(str(exported))
    known: Any = og.Adapters(model)
    known.load(str(file), method)
    made = {}
    for name in ("", method):
        given = prompt()[0].tolist()
        ids = np.array([given + by_genai(model, given, STEPS, known, name)])
        made[name] = expected_of(graph if name else base_of("llama")[1], ids)[0, prompt().shape[1] - 1 : -1]
        assert made[name].argmax(-1).tolist() == ids[0, prompt().shape[1] :].tolist()
    assert np.abs(made[""][0] - made[method][0]).max() > 1e-3


def test_both_forms_hold_the_same(exported: Path, record: dict[str, Any], tmp_path: Path) -> None:
    """One with what an adapter fills, one with every slot."""
    tensors = tensors_of(adapted("dora"), record)
    for suffix in (".onnx_adapter", ".safetensors"):
        adapter_file.write(tensors, record, tmp_path / f"x{suffix}")
    native, plain = (adapter_file.load(tmp_path / f"x{s}", exported).inputs for s in (".onnx_adapter", ".safetensors"))
    assert set(native) == set(tensors) < set(plain) == set(record["slots"]["inputs"])
    for name, value in native.items():
        assert np.array_equal(value, plain[name]), name


REFUSED: dict[str, tuple[str, Any, str]] = {
    "name": ("model.layers.9.self_attn.q_proj.out_scale", np.ones(32, np.float32), "no slot"),
    "shape": ("model.layers.0.self_attn.q_proj.out_scale", np.ones(31, np.float32), r"\[31\]"),
    "dtype": ("model.layers.0.self_attn.q_proj.out_scale", np.ones(32, np.float16), "float16"),
    "alone": ("model.layers.0.self_attn.q_proj.lora_A", np.ones((32, 2), np.float32), "different ranks"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_not_written(why: str, record: dict[str, Any], tmp_path: Path) -> None:
    name, value, said = REFUSED[why]
    with pytest.raises(UsageError, match=said):
        adapter_file.write({name: value}, record, tmp_path / "x.onnx_adapter")
    with pytest.raises(UsageError, match=r"end it with \.onnx_adapter"):
        adapter_file.write({}, record, tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == []


def test_parts_without_a_slot_are_named(record: dict[str, Any]) -> None:
    """An adapter is compiled whole or not at all."""
    base = base_of("llama")[1]
    head = run.apply(base, make("lora", targets="lm_head,q_proj,embed_tokens"))
    with pytest.raises(UnsupportedError, match=r"embed_tokens \(embedding\), lm_head \(linear\)"):
        adapter_slots.compiled(head, record)
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight"):
        adapter_slots.compiled(run.apply(base, make("lora", modules_to_save="norm")), record)
    with pytest.raises(UnsupportedError, match="gates"):
        adapter_slots.compiled(run.apply(base, make("prefix", tokens=2, init="gated")), record)
    with pytest.raises(UsageError, match="no adapter"):
        adapter_slots.compiled(base, record)


def test_an_adapter_that_computes_something_else_is_no_export(
    exported: Path, record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an export asks of each of its adapters, whose folder is gone when this raises."""
    compiled = adapter_slots.compiled
    monkeypatch.setattr(adapters, "compiled", lambda *of: {name: 2 * value for name, value in compiled(*of).items()})
    probes = make_probes(base_of("llama")[1], length=8)

    def replayed(graph: Graph, fed: adapter_file.Loaded) -> check.Replay:
        return check.replay(graph, exported / "model.onnx", probes, torch.float32, 3, fed)

    with pytest.raises(CheckFailed, match="with the adapter mine") as failed:
        adapters.put({"mine": adapted("dora")}, record, tmp_path, replayed)
    assert failed.value.exit_code == 1


def test_trained_biases_are_the_adapter_s() -> None:
    """What trains with an adapter is not the base's; of a bias a slot holds what it is more."""
    base = base_of("gpt2")[1]
    graph = run.apply(base, make("lora", targets="c_attn", bias="sites"))
    name = "transformer.h.0.attn.c_attn.bias"
    graph.inserted[name] = Held(base.values[name] + 1)
    assert torch.equal(fold.value_of(adapter_slots.base_of(graph), name), base.values[name])
    record = {
        "base": adapter_slots.described(base),
        "slots": {"inputs": {f"{name.removesuffix('bias')}lora_A": []}, "prefix": "none", "dtype": "float32"},
    }
    with pytest.raises(UnsupportedError, match=r"h\.1\.attn\.c_attn"):
        adapter_slots.compiled(graph, record)
    record["slots"]["inputs"] = {f"transformer.h.{i}.attn.c_attn.lora_A": [] for i in range(4)}
    shift = adapter_slots.compiled(graph, record)[f"{name.removesuffix('bias')}out_shift"]
    assert torch.allclose(shift, torch.ones_like(shift), atol=1e-6)


def test_another_base_is_refused(record: dict[str, Any]) -> None:
    other = dataclasses.replace(adapted("lora"), source=str(folder_of("mistral")))
    with pytest.raises(UsageError, match="another checkpoint"):
        adapter_slots.compiled(other, record)
    with pytest.raises(UsageError, match="context 128, and the export has none"):
        adapter_slots.compiled(dataclasses.replace(adapted("lora"), context=128), record)


def test_a_file_for_another_export_is_refused(exported: Path, record: dict[str, Any], tmp_path: Path) -> None:
    """ONNX Runtime itself would take it."""
    adapter_file.write(tensors_of(adapted("lora"), record), record, tmp_path / "x.onnx_adapter")
    (tmp_path / "onnx").mkdir()
    other = json.loads(json.dumps(record))
    other["base"]["fingerprint"] = "0" * 64
    other["slots"]["model_version"] = adapter_file.model_version(other)
    (tmp_path / "onnx" / "surgeon.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match="made for another export"):
        adapter_file.load(tmp_path / "x.onnx_adapter", tmp_path / "onnx")
    other["slots"]["dtype"] = "float16"
    (tmp_path / "onnx" / "surgeon.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match="changed after the export"):
        adapter_file.load(tmp_path / "x.onnx_adapter", tmp_path / "onnx")
    (tmp_path / "y.onnx_adapter").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read"):
        adapter_file.load(tmp_path / "y.onnx_adapter", exported)
    shutil.rmtree(tmp_path / "onnx")
    with pytest.raises(UsageError, match=r"no surgeon\.json"):
        adapter_file.load(tmp_path / "x.onnx_adapter", tmp_path / "onnx")
