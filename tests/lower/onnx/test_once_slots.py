"""Classifiers and encoders whose adapters are inputs: swapped in one session, their heads with them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch

from benchmarks.zoo.folders import base_of, folder_of, reference
from benchmarks.zoo.graphs import randomised
from surgeon import api
from surgeon.cli.main import main
from surgeon.errors import CheckFailed, UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.lower.onnx import adapter, adapter_file, adapter_slots, adapters, export, session, whole
from surgeon.lower.onnx.profiles import find
from surgeon.lower.onnx.verify import fed_once, verify
from surgeon.model import load_model
from surgeon.passes import make
from surgeon.run import apply
from tests.lower.onnx.test_seq2seq_slots import Activated
from tests.lower.onnx.test_verify import alone

TASK, ERROR = "sequence-classification", 1e-5
HEADS = {"bert": "classifier", "roberta": "classifier", "distilbert": "pre_classifier,classifier"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"rank": 3}),
    "rslora": ("lora", {"rank": 4, "rslora": True}),
    "dora": ("dora", {"rank": 2}),
    "dylora": ("dylora", {"rank": 4}),
    "adalora": ("adalora", {}),
    "vera": ("vera", {"rank": 5}),
    "ia3": ("ia3", {}),
    "loha": ("loha", {"rank": 2}),
    "prefix": ("prefix", {"tokens": 3}),
    "prefix-mlp": ("prefix", {"tokens": 2, "hidden": 6}),
    "ptuning_v2": ("ptuning_v2", {"tokens": 2}),
}
COLUMNS = ("prefix", "prefix-mlp", "ptuning_v2")
EACH = [pytest.param(name, marks=() if name in ("dora", "ptuning_v2") else pytest.mark.slow) for name in METHODS]
pytestmark = pytest.mark.usefixtures("lowered_once")


def adapted(method: str, family: str = "bert", task: str = TASK, **options: Any) -> Graph:
    """The base with a method whose values were drawn, those of a head that trains with it too."""
    name, own = METHODS[method]
    where = {} if method in COLUMNS else {"targets": "all-linear"}
    return randomised(apply(base_of(family, task)[1], make(name, **{**own, **where, **options})), std=0.1)


def headed(family: str = "bert", method: str = "lora") -> Graph:
    return adapted(method, family, modules_to_save=HEADS[family])


@pytest.fixture(scope="module")
def exported(lowered_once: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with optional slots, and two adapters that were proven with it."""
    given, out = {"mine": headed(), "before": adapted("prefix")}, tmp_path_factory.mktemp("slots") / "onnx"
    return export.export_onnx(base_of("bert", TASK)[1], out, adapters="slots", given=given).folder


@pytest.fixture(scope="module")
def record(exported: Path) -> dict[str, Any]:
    return adapter_file.read_export(exported)


@pytest.fixture(scope="module")
def opened(exported: Path) -> Any:
    return session.open_session(exported / export.MODEL)


def text() -> dict[str, Any]:
    """Three texts, two of them padded."""
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(4)).tolist()
    return session.padded([row[: 9 - 3 * number] for number, row in enumerate(ids)], 1)


@torch.no_grad()
def error_of(run: Any, expect: Graph | Any, fed: Any = None) -> float:
    """The largest difference from a model in torch, or a graph of ours, relative to its largest output."""
    given = {node.name: text()[node.name] for node in run.get_inputs() if node.name in text()}
    found = run.run(None, fed_once(run, given, fed.feed() if fed else {}))[0]
    model = load_model(expect) if isinstance(expect, Graph) else expect
    expected = model(**{name: torch.from_numpy(value) for name, value in given.items()})[0].numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_base_and_adapters_are_proven_and_replayed_with_onnxruntime_alone(exported: Path) -> None:
    told = json.loads((exported / "surgeon.json").read_text())
    assert [told["slots"][word] for word in ("form", "prefix", "optional")] == ["slots", "slots", True]
    every = [told["verified"], *(entry["verified"] for entry in told["adapters"])]
    for verified in every:
        assert (verified["token_agreement"], verified["steps"]) == (1.0, 0)
        assert 0 < verified["max_error"] <= verified["bound"]
        assert [len(batch["prompts"]) for batch in verified["batches"]] == [1, 3]
    assert len({str(verified["batches"][0]["best_logits"]) for verified in every}) == 3
    done = alone("verify", str(exported), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["probes"], found["token_agreement"]) == (True, 3 * 4, 1.0)


def test_an_adapter_that_changed_is_caught(exported: Path, record: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "onnx")
    told, file = json.loads((exported / "surgeon.json").read_text()), "adapters/mine.onnx_adapter"
    tensors = dict(adapter_file.load(exported / file, exported).inputs)
    adapter_file.write(
        {**tensors, "classifier.lora_A": 2 * tensors["classifier.lora_A"]}, record, tmp_path / "onnx" / file
    )
    told["files"].pop(file)
    (tmp_path / "onnx" / "surgeon.json").write_text(json.dumps(told))
    with pytest.raises(CheckFailed, match="computes something else than when it was made"):
        verify(tmp_path / "onnx").require("here")


def test_linears_the_head_and_attentions_have_slots(exported: Path, record: dict[str, Any]) -> None:
    graph = ir.load(exported / export.MODEL).graph
    shapes = {str(v.name): [str(size) for size in v.shape or ()] for v in graph.inputs}
    assert set(record["slots"]["inputs"]) == {name for name in shapes if adapter_file.is_slot(name)}
    assert set(record["slots"]["inputs"]) <= set(graph.initializers)
    assert len(record["slots"]["inputs"]) == (2 * 6 + 2) * 5 + 2 * 2
    assert shapes["classifier.lora_B"] == ["classifier.rank", "3"]
    assert shapes["bert.pooler.dense.out_shift"] == ["bert.pooler.dense.out_shift.size"]
    assert shapes["prefix.1.encoder.key"] == ["1", "4", "encoder_prefix_length", "8"]
    assert [name for name in shapes if not adapter_file.is_slot(name)] == [
        "input_ids", "attention_mask", "token_type_ids"
    ]  # fmt: skip


@pytest.mark.parametrize("method", EACH)
def test_every_method_is_swapped_in_the_same_session(
    method: str, opened: Any, record: dict[str, Any], tmp_path: Path
) -> None:
    graph, file = adapted(method), tmp_path / "x.onnx_adapter"
    adapter_file.write(adapters.arrays(adapter_slots.compiled(graph, record)), record, file)
    assert error_of(Activated(opened, file), graph) < ERROR
    assert error_of(opened, base_of("bert", TASK)[1]) < ERROR


def test_a_head_is_the_rank_of_its_classes(record: dict[str, Any]) -> None:
    """W' = W + Δ: as many factors as the smaller side of the matrix, and the bias's difference."""
    graph = headed()
    tensors = adapter_slots.compiled(graph, record)
    wanted, base = graph.inserted["classifier.weight"](), graph.values["classifier.weight"]
    assert tensors["classifier.lora_A"].shape == (32, 3)
    delta = (tensors["classifier.lora_A"] @ tensors["classifier.lora_B"]).t()
    assert torch.allclose(base + delta, wanted, atol=1e-6)
    moved = graph.inserted["classifier.bias"]() - graph.values["classifier.bias"]
    assert torch.equal(tensors["classifier.out_shift"], moved)
    wide = whole.factors(torch.ones(5, 3))
    assert (wide.a is not None and wide.a.shape, wide.b is not None and wide.b.shape) == ((3, 3), (5, 3))


@pytest.mark.usefixtures("captured_once")
def test_a_folder_of_peft_and_a_work_folder_are_compiled(
    exported: Path, opened: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = written(tmp_path / "lora")
    api.apply(folder_of("bert", TASK), "ptuning-v2", tokens=2).save(tmp_path / "work")
    for name, slots in (("lora", 2 * 3 * 4 + 3), ("work", 2 * 2 + 2)):
        out = tmp_path / f"{name}.onnx_adapter"
        assert main(["adapter", str(tmp_path / name), "--for", str(exported), "-o", str(out), "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert (made["slots"], made["steps"], made["token_agreement"]) == (slots, 0, 1.0)
        assert 0 < made["max_error"] <= made["bound"]
    assert error_of(Activated(opened, tmp_path / "lora.onnx_adapter"), theirs) < ERROR


def written(folder: Path) -> Any:
    """PEFT's own model with a DoRA and a head that are moved at random, saved in a folder."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, use_dora=True, target_modules=["query", "output.dense"])
    theirs: Any = peft.get_peft_model(reference(folder_of("bert", TASK)), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(folder)
    return theirs


def test_what_has_no_slot_is_named(record: dict[str, Any]) -> None:
    prompt = apply(base_of("bert", TASK)[1], make("prompt", tokens=2, init="normal"))
    with pytest.raises(UnsupportedError, match="prompt has no constant keys and values in bert") as refused:
        adapter_slots.compiled(prompt, record, "prompts/")
    assert (refused.value.where, "--adapters merge" in refused.value.hint) == ("prompts/", True)
    norms = adapted("lora", modules_to_save="all-norms")
    with pytest.raises(UnsupportedError, match=r"LayerNorm\.weight.* and \d+ more") as refused:
        adapter_slots.compiled(norms, record, "norms/")
    assert "--adapters merge" in refused.value.hint
    with pytest.raises(UnsupportedError, match="stacked adapters are for models that generate; bert is read for"):
        adapters.slotted(base_of("bert", TASK)[1], find("ort"), "all-linear", adapters.STACKED)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "name": ("scorer.out_scale", np.ones(3, np.float32), "no slot"),
    "shape": ("classifier.out_shift", np.ones(2, np.float32), r"\[2\]"),
    "heads": ("prefix.0.encoder.key", np.ones((1, 3, 2, 8), np.float32), r"\[1, 3, 2, 8\]"),
    "dtype": ("classifier.out_scale", np.ones(3, np.float16), "float16"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_not_written(why: str, record: dict[str, Any], tmp_path: Path) -> None:
    name, value, said = REFUSED[why]
    with pytest.raises(UsageError, match=said):
        adapter_file.write({name: value}, record, tmp_path / "x.onnx_adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("why", ["base", "prompt"])
def test_what_is_refused_is_said_in_three_lines(
    why: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"base": "another checkpoint", "prompt": "virtual tokens run together with the text"}[why]
    graph = apply(base_of("bert", TASK)[1], make("prompt", tokens=2, init="normal"))
    given = graph if why == "prompt" else replace(adapted("lora"), source=str(folder_of("llama")))
    monkeypatch.setattr(adapter, "read", lambda *of: given)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["adapter", "mine/", "--for", str(exported)]) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert (len(lines), said in lines[0], "mine" in lines[1]) == (3, True, True)
    assert list(tmp_path.iterdir()) == []
