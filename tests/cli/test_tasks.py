"""`surgeon apply`, `train`, `eval` and `plan` for classifiers, from the command line."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.encoder import save_encoder
from surgeon.cli.main import main
from surgeon.manifest import read_manifest

Run = Callable[..., dict[str, Any]]

TASK = ("--task", "sequence-classification")
SHORT = ("--lr", "0.2", "--batch-size", "8", "--warmup", "0", "--scheduler", "constant")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw = random.Random(0)
    lines = [("good great lovely", "pos"), ("bad dull awful", "neg"), ("the house river", "other")] * 8
    text = "".join(f"the film was {' '.join(draw.sample(words.split(), 2))},{name}\n" for words, name in lines)
    (tmp_path / "d.csv").write_text("text,label\n" + text)
    return tmp_path / "d.csv"


def test_a_new_head_takes_the_classes_of_the_data(
    encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    work = tmp_path / "work"
    plan = run("apply", encoder, "--method", "ptuning-v2", "--tokens", 4, *TASK, "-o", work)
    assert plan["trainable_parameters"] == 2 * 2 * 4 * 16 + 2 * 17
    found = run("train", work, "--data", data, "--eval-data", data, "--steps", 80, *SHORT)
    assert found["eval_metrics"]["accuracy"] > 0.9
    assert found["trainable_parameters"] == 2 * 2 * 4 * 16 + 3 * 17
    assert read_manifest(work).labels == ("neg", "other", "pos")
    report = run("eval", work, "--data", data)
    assert report["accuracy"] == found["eval_metrics"]["accuracy"]
    assert report["examples"] == 24
    assert {"loss", "f1_macro"} <= set(report)
    assert "base" not in report, "a head that is new has no base to compare with"
    (tmp_path / "bad.csv").write_text("text,label\na film,pos\na film,odd\n")
    assert main(["eval", str(work), "--data", str(tmp_path / "bad.csv")]) == 2
    what, where, hint = capsys.readouterr().err.splitlines()
    assert "unknown label 'odd'" in what
    assert "bad.csv:3" in where
    assert "other" in hint


def test_labels_by_hand_and_a_sample_before_the_start(
    encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    work = tmp_path / "work"
    run("apply", encoder, "--method", "ptuning_v2", *TASK, "--labels", "pos,neg,other", "-o", work)
    assert main(["train", str(work), "--data", str(data), "--steps", "1", *SHORT]) == 0
    shown = capsys.readouterr().err
    assert "24 samples for sequence-classification" in shown
    assert "→ pos" in shown
    assert read_manifest(work).labels == ("pos", "neg", "other")


@pytest.mark.slow
def test_resumed_runs_keep_their_classes(encoder: Path, data: Path, tmp_path: Path, run: Run) -> None:
    work = tmp_path / "work"
    run("apply", encoder, "--method", "ptuning_v2", "--tokens", 3, *TASK, "-o", work)
    run("train", work, "--data", data, "--steps", 4, "--save-every", 2, *SHORT, "-o", tmp_path / "whole")
    (work / "checkpoint-2").symlink_to(tmp_path / "whole/checkpoint-2")
    found = run("train", work, "--data", data, "--steps", 4, "--save-every", 2, *SHORT, "--resume")
    assert found["resumed_from"] == 2
    assert read_manifest(work).labels == ("neg", "other", "pos")


def test_refusals(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply", str(encoder), "--method", "ptuning-v2", "--task", "features", "-o", str(tmp_path / "w")]) == 2
    assert "--method prefix" in capsys.readouterr().err
    assert main(["apply", str(encoder), *TASK, "--labels", "one", "-o", str(tmp_path / "w")]) == 2
    assert "names no classes" in capsys.readouterr().err
