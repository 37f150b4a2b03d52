"""Slots of models that are run once: other architectures, tasks, profiles and precisions; heads that a seed drew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.encoder import save_encoder
from benchmarks.zoo.folders import base_of
from surgeon import api
from surgeon.errors import UsageError
from surgeon.lower.onnx import adapter_file, export, session
from surgeon.lower.onnx.adapter_slots import check_base, described
from surgeon.lower.onnx.verify import verify
from tests.lower.onnx.test_once_slots import ERROR, HEADS, TASK, adapted, error_of

pytestmark = pytest.mark.usefixtures("lowered_once")


def test_a_head_drawn_by_another_seed_is_another_base(tmp_path: Path) -> None:
    """A base without a head gets one by its seed, and the difference from it is in the adapter."""
    base = save_encoder(tmp_path / "base")
    made = [api.read(base, TASK, seed=seed) for seed in (0, 3)]
    one, other = ({"base": described(graph)} for graph in made)
    check_base(made[0], one, "here")
    with pytest.raises(UsageError, match="another base: a new head of other classes or another seed"):
        check_base(made[0], other, "here")
    three = api.read(base, TASK, labels=["a", "b", "c"])
    with pytest.raises(UsageError, match="another base: a new head"):
        check_base(three, one, "here")


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "distilbert-web": ("distilbert", TASK, {"profile": "web"}),
    "roberta-openvino": ("roberta", TASK, {"profile": "openvino"}),
    "roberta-opset-23": ("roberta", TASK, {"opset": 23}),
    "bert-int4": ("bert", TASK, {"precision": "int4"}),
    "bert-fp16": ("bert", TASK, {"precision": "fp16"}),
    "distilbert-questions": ("distilbert", "question-answering", {}),
    "bert-features": ("bert", "features", {}),
    "deberta-tokens": ("deberta-v2", "token-classification", {}),
    "gpt2-classifier": ("gpt2", TASK, {}),
}


QUICK = "distilbert-web"
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != QUICK]


@pytest.mark.parametrize("case", [QUICK, *SLOW])
def test_families_profiles_and_tasks(case: str, tmp_path: Path) -> None:
    family, task, options = CASES[case]
    head = HEADS.get(family, "score" if family == "gpt2" else "classifier") if task == TASK else ""
    saved = {"modules_to_save": head} if head else {}
    given = {"dora": adapted("dora", family, task, **saved), "deep": adapted("prefix", family, task)}
    report = export.export_onnx(base_of(family, task)[1], tmp_path / "onnx", adapters="slots", given=given, **options)
    assert report.token_agreement == 1.0
    told = json.loads((report.folder / "surgeon.json").read_text())
    assert [entry["verified"]["token_agreement"] for entry in told["adapters"]] == [1.0, 1.0]
    verify(report.folder).require(case)
    if options.get("profile") in ("web", "openvino"):
        run = session.open_session(report.folder / told["model"])
        fed = adapter_file.load(report.folder / told["adapters"][0]["file"], report.folder)
        assert set(fed.inputs) == set(told["slots"]["inputs"])
        assert error_of(run, given["dora"], fed) < ERROR
