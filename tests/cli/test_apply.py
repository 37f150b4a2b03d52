"""`surgeon apply`: a work folder with what was asked for, or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from surgeon import store
from surgeon.cli.main import main


@pytest.fixture
def model(tiny_llama: Path) -> str:
    return str(tiny_llama)


def applied(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    code = main(["apply", *args, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_planned_parameters_are_in_the_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "work"
    found = applied(capsys, model, "--rank", "4", "--targets", "all-linear", "--seed", "3", "-o", str(out))
    assert found["folder"] == str(out)
    stored = load_file(out / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == found["stored_parameters"]
    assert sum(tensor.nbytes for tensor in stored.values()) == found["bytes"]["adapter"]
    assert json.loads((out / "surgery.json").read_text())["seed"] == 3


def test_methods_stack_in_order(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "work"
    found = applied(capsys, model, "-m", "lora(rank=2)", "-m", "vera(rank=4, targets=up_proj)", "-o", str(out))
    graph = store.load(out)
    assert [step.name for step in graph.applied] == ["lora", "vera"]
    assert sum(spec.count for spec in graph.trainable().values()) == found["trainable_parameters"]


def test_the_next_command_is_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["apply", model, "--rank", "2"]) == 0
    assert (tmp_path / "work" / "surgery.json").is_file()
    assert "next: surgeon train work" in capsys.readouterr().err
    assert main(["apply", model, "--rank", "2"]) == 2
    assert "work" in capsys.readouterr().err
    assert main(["apply", model, "--rank", "3", "--overwrite"]) == 0


@pytest.mark.parametrize("args", [["--rank", "0"], ["--rank", "100"], ["--targets", "nothing"], ["--method", "vra"]])
def test_nothing_is_written_after_a_complaint(
    args: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["apply", model, *args, "-o", str(tmp_path / "work")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert list(tmp_path.iterdir()) == []
