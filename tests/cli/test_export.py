"""`surgeon export`: from the command line to a folder that runs, or three lines and nothing."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo import build, graphs
from surgeon import api, lower
from surgeon.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.save(graphs.model_of("llama"), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def work(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = api.apply(base, "lora", rank=4, targets="all-linear")
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            parameter.data += 0.1
    return model.save(tmp_path_factory.mktemp("work") / "work")


def test_a_work_folder_becomes_onnx(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "onnx"
    assert main(["export", str(work), "--target", "onnx", "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_agreement"] == 1.0
    assert 0 < found["max_error"] <= found["bound"]
    assert found["seconds"] > 0
    assert found["peak_rss_bytes"] > 1e8
    assert found["steps"] == 20
    assert sorted(found["files"]) == sorted(path.name for path in out.iterdir())
    for path in out.iterdir():
        assert str(work).encode() not in path.read_bytes()


def test_hf_is_merge(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(work), "--target", "hf", "-o", str(tmp_path / "hf"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"max_error", "bound", "token_agreement", "seconds", "peak_rss_bytes"} <= set(found)
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--target", "onxx"], 2, "onnx"),
        (["--precision", "fp61"], 2, "fp16"),
    ],
)
def test_wrong_options_suggest_right_ones(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    assert main(["export", str(base), "-o", str(tmp_path / "out"), *options]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert said in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("keep")
    assert main(["export", str(base), "-o", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_package_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "onnxscript":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, lower.TARGETS["onnx"], raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["export", str(base), "-o", str(tmp_path / "out")]) == 3
    assert "pip install model-surgeon[onnx]" in capsys.readouterr().err
