"""Classifiers and encoders through ONNX Runtime: one pass, virtual tokens as constants, positions made inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import surgeon
from benchmarks.zoo.encoder import save_encoder
from benchmarks.zoo.graphs import graph_of, randomised
from surgeon import run
from surgeon.errors import CheckFailed
from surgeon.lower.onnx import export, once
from surgeon.lower.onnx import session as ort
from surgeon.model import load_model
from surgeon.passes import make

ERROR = 1e-5  # relative to the largest output: fp32 arithmetic in another order
DEEP, ROWS = ("ptuning_v2", {"tokens": 3}), ("prompt", {"tokens": 4, "init": "normal"})
MLP = ("prefix", {"tokens": 3, "hidden": 6, "dropout": 0.1})
CASES: dict[str, tuple[str, str, list[tuple[str, dict[str, Any]]]]] = {
    "bert-ptuning-lora": ("bert", "sequence-classification", [DEEP, ("lora", {"targets": "*.query", "rank": 2})]),
    "roberta-prefix-mlp": ("roberta", "question-answering", [MLP]),
    "distilbert-prompt": ("distilbert", "token-classification", [ROWS]),
    "roberta-prompt-peft": ("roberta", "token-classification", [("prompt", ROWS[1] | {"layout": "peft"})]),
    "deberta-ptuning": ("deberta-v2", "token-classification", [DEEP]),
    "bert-gate-states": ("bert", "features", [("prefix", {"tokens": 3, "init": "gated"})]),
    "bert-ia3-loha": (
        "bert",
        "sequence-classification",
        [
            ("ia3", {"targets": "*.{key,value} *.output.dense", "inputs": "*.output.dense"}),
            ("loha", {"targets": "*.query", "rank": 2}),
        ],
    ),
    "gpt2-prefix": ("gpt2", "sequence-classification", [("prefix", {"tokens": 3})]),
}
slow = [pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[1:]]


def feed(graph: Any) -> dict[str, Any]:
    """Three texts, two of them padded on the right; no positions."""
    pad = getattr(graph.config, "pad_token_id", 0) or 0
    ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, count in enumerate((0, 4, 2)):
        ids[row, 9 - count :] = pad
        mask[row, 9 - count :] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    return given | ({"token_type_ids": mask.flip(-1)} if "token_type_ids" in graph.inputs else {})


@pytest.mark.parametrize("case", ["bert-ptuning-lora", *slow])
@torch.no_grad()
def test_it_computes_what_torch_does(case: str, tmp_path: Path) -> None:
    family, task, steps = CASES[case]
    graph = run.apply(graph_of(family, task), *(make(name, **options) for name, options in steps))
    graph = randomised(graph, std=0.5)
    report = export.export_onnx(graph, tmp_path / "onnx")
    assert report.token_agreement == 1.0
    given = feed(graph)
    expected = load_model(graph)(**given)
    session = ort.open_session(tmp_path / "onnx" / export.MODEL)
    assert [node.name for node in session.get_inputs()] == [name for name in graph.inputs if name != "position_ids"]
    found = session.run(list(graph.outputs), {node.name: given[node.name].numpy() for node in session.get_inputs()})
    for name, value in zip(graph.outputs, found, strict=True):
        wanted = getattr(expected, name).numpy()
        assert np.abs(value - wanted).max() <= ERROR * np.abs(wanted).max()


def test_multiple_choice_in_half_precision(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base")
    graph = randomised(surgeon.apply(base, "ptuning-v2", task="multiple-choice", tokens=3).trained())
    report = export.export_onnx(graph, tmp_path / "onnx", precision="fp16")
    assert report.token_agreement == 1.0
    model = ir.load(tmp_path / "onnx" / export.MODEL).graph
    shapes = {value.name: [str(size) for size in value.shape or ()] for value in (*model.inputs, *model.outputs)}
    assert shapes["input_ids"] == ["batch_size", "choices", "sequence_length"]
    assert shapes["logits"] == ["batch_size", "choices"]
    assert sorted(report.files) == ["config.json", "model.onnx", "model.onnx.safetensors", "surgeon.json"]
    manifest = json.loads((tmp_path / "onnx" / export.MANIFEST).read_text())
    assert [step["name"] for step in manifest["passes"]] == ["ptuning_v2"]
    assert manifest["verified"]["steps"] == 0


def test_another_model_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = graph_of("bert")
    other = randomised(run.apply(base, make("ptuning_v2", tokens=3)))
    monkeypatch.setattr(once, "numbered", lambda _: base)
    with pytest.raises(CheckFailed, match="ONNX Runtime computes something else"):
        export.export_onnx(other, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
