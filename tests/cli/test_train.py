"""`surgeon train`: learns, resumes, survives a kill, and names the row that is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from surgeon import api
from surgeon.cli.main import main
from surgeon.cli.train import HELP
from surgeon.recipe import Recipe

SHORT = ("--batch-size", "2", "--max-length", "64", "--lr", "3e-3", "--warmup", "0")


@pytest.fixture(scope="module")
def applied(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("applied") / "work"
    api.apply(shared / "models/pystdlib-llama", "lora", rank=4, targets="all-linear").save(folder)
    return folder


@pytest.fixture
def work(applied: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(applied, tmp_path / "work"))


@pytest.fixture(scope="module")
def data(c_headers: Callable[[str, int], Path]) -> Path:
    return c_headers("train", 40)


def trained(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    code = main(["train", *map(str, args), *SHORT, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def test_every_option_of_the_recipe_has_help() -> None:
    assert list(HELP) == [field.name for field in dataclasses.fields(Recipe)]


def test_held_out_loss_falls(
    work: Path, data: Path, c_headers: Callable[[str, int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = c_headers("heldout", 12)
    before = api.load(work)
    found = trained(capsys, work, "--data", data, "--eval-data", held_out, "--steps", 12)
    assert found["steps"] == 12
    assert main(["eval", str(work), "--data", str(held_out), "--max-length", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["loss"] == pytest.approx(found["eval_loss"], abs=1e-5)
    assert report["loss"] < report["base"]["loss"] - 0.1
    assert before.graph.applied == api.load(work).graph.applied
    assert {"loss.jsonl", "loss.png", "checkpoint-12"} <= {path.name for path in work.iterdir()}


def test_a_sample_is_shown_before_training(work: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(work), "--data", str(data), "--steps", "1", *SHORT]) == 0
    shown = capsys.readouterr().err
    assert "40 samples" in shown
    assert "ARMENIAN FULL STOP" in shown
    assert f"surgeon merge {work}" in shown.replace("\n", "")


def test_resumed_equals_uninterrupted(
    work: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    trained(capsys, work, "--data", data, "--steps", 4, "--save-every", 2, "-o", whole)
    shutil.copytree(whole / "checkpoint-2", work / "checkpoint-2")
    found = trained(capsys, work, "--data", data, "--steps", 4, "--save-every", 2, "--resume")
    assert found["resumed_from"] == 2
    ours, theirs = weights(work), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_killed_run_leaves_a_work_folder(work: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = weights(work)
    args = ["train", str(work), "--data", str(data), "--steps", "400", "--save-every", "2", *SHORT]
    process = subprocess.Popen(
        [sys.executable, "-m", "surgeon", *args], stderr=subprocess.DEVNULL, env=dict(os.environ)
    )
    try:
        deadline = time.monotonic() + 300
        while not (work / "checkpoint-2").is_dir() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (work / "checkpoint-2").is_dir() or (work / "checkpoint-4").is_dir()
    after = weights(work)
    assert all(after[name].equal(before[name]) for name in before)
    assert api.load(work).graph.applied
    assert main(["train", str(work), "--data", str(data), "--steps", "400", *SHORT]) == 2
    assert "an earlier run is here" in capsys.readouterr().err


def test_bad_row_names_file_and_line(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    before = sorted(work.iterdir())
    assert main(["train", str(work), "--data", str(bad)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "bad.jsonl" in lines[1]
    assert "2" in lines[1]
    assert sorted(work.iterdir()) == before


@pytest.mark.parametrize("content", ["", "\n"])
def test_empty_data(work: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(content)
    assert main(["train", str(work), "--data", str(empty)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_a_folder_that_is_none(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "nothing"), "--data", str(data)]) == 2
    assert "surgeon apply" in capsys.readouterr().err


def test_bad_options(work: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(work), "--data", str(data), "--scheduler", "cosin"]) == 2
    assert "cosine" in capsys.readouterr().err
    assert main(["train", str(work)]) == 2
    assert "--data" in capsys.readouterr().err
