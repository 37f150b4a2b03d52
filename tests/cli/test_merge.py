"""`surgeon merge`, `verify` and `demo`: what they print, their exit codes, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo.folders import folder_of
from surgeon import api
from surgeon.cli.main import main


@pytest.fixture
def work(tmp_path: Path) -> Path:
    model = api.apply(folder_of("llama"), "lora", rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model.save(tmp_path / "work")


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_merge_and_verify(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(work), "-o", str(out), "--json"]) == 0
    found = printed(capsys)
    assert {"max_error", "bound", "token_agreement", "seconds", "peak_rss_bytes"} <= set(found)
    assert 0 < found["max_error"] <= found["bound"]
    manifest = json.loads((out / "surgeon.json").read_text())
    assert manifest["verified"]["max_error"] == found["max_error"]
    assert manifest["base"] == "llama"
    assert str(folder_of("llama").parent) not in (out / "surgeon.json").read_text()
    assert main(["verify", str(work), str(out), "--json"]) == 0
    found = printed(capsys)
    assert found["ok"]
    assert {"max_error", "bound", "token_agreement", "seconds", "peak_rss_bytes"} <= set(found)


def test_verify_tells_another_function(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(work), str(folder_of("llama"))]) == 1
    assert "not the same function" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--dtype", "bf16"], "unknown dtype"), ([], "exists"), (["--overwrite", "--base", "nowhere"], "nowhere")],
    ids=["dtype", "existing folder", "missing base"],
)
def test_merge_refuses(
    work: Path, tmp_path: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert main(["merge", str(work), "-o", str(out), *options]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert not list(tmp_path.glob(".merged*"))


@pytest.fixture(scope="module")
def virtual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with a prefix over a LoRA."""
    model = api.apply(api.apply(folder_of("llama"), "lora", rank=2), "prefix", tokens=3)
    return model.save(tmp_path_factory.mktemp("virtual") / "work")


def test_what_does_not_fold_is_an_adapter_beside(
    virtual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert main(["merge", str(virtual), "-o", str(out)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "not folded: prefix" in said
    assert (out / "adapter" / "adapter_config.json").is_file()
    assert main(["verify", str(virtual), str(out), "--json"]) == 0
    assert printed(capsys)["ok"]


def test_strict_merges_all_or_nothing(virtual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(virtual), "-o", str(tmp_path / "merged"), "--strict"]) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 3
    assert "prefix cannot be folded" in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_merge_of_a_plain_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(folder_of("llama")), "-o", str(tmp_path / "merged")]) == 2
    assert "nothing to merge" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_demo_refuses_what_is_not_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["demo", str(tmp_path)]) == 2
    assert main(["demo", str(tmp_path), "--overwrite"]) == 2
    assert "no demo's" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert main(["demo", str(tmp_path / "new"), "--steps", "0"]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "demo"), "--seconds", "5", "--steps", "10", "--json"]) == 0
    for adapter in printed(capsys)["adapters"]:
        assert adapter["loss_after"] < adapter["loss_before"]
        assert adapter["merge_error"] <= adapter["merge_bound"]
        assert adapter["onnx_agreement"] == 1
