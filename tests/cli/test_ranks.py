"""One DyLoRA adapter, evaluated, merged and exported at any rank from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from surgeon import api
from surgeon.cli.main import main


@pytest.fixture(scope="module")
def work(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder whose adapter does something at every rank."""
    model = api.apply(shared / "models/pystdlib-llama", "dylora", rank=3, alpha=6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("dylora.b"):
                p.normal_(0, 0.05)
    folder = tmp_path_factory.mktemp("ranks") / "work"
    model.save(folder)
    return folder


def test_eval_prints_and_plots_every_rank(
    work: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "heldout.jsonl"
    data.write_text((shared / "data/c_headers.heldout.jsonl").read_text().splitlines()[0])
    common = ["eval", str(work), "--data", str(data), "--max-length", "48", "--json", "--no-against-base"]
    assert main([*common, "--ranks", "all"]) == 0
    report = json.loads(capsys.readouterr().out)
    losses = {rank: one["loss"] for rank, one in report["ranks"].items()}
    assert list(losses) == ["1", "2", "3"]
    assert losses["3"] == report["loss"]
    assert len(set(losses.values())) == 3
    assert (work / "loss_by_rank.png").read_bytes().startswith(b"\x89PNG")
    assert main([*common, "--ranks", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["ranks"]["2"]["loss"] == losses["2"]


@pytest.mark.parametrize("command", [["merge"], ["export", "--target", "onnx"]])
def test_a_lower_rank_is_merged_and_exported(
    command: list[str], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([command[0], str(work), *command[1:], "-o", str(out), "--rank", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_error"] <= report["bound"]
    if command[0] == "merge":
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(out)(ids).logits
            lower, highest = (api.load(work, rank=rank)(input_ids=ids).logits for rank in (2, None))
        assert (found - lower).abs().max() < 1e-4
        assert (found - highest).abs().max() > 1e-2


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_rank_above_the_trained_one_is_refused_and_nothing_written(
    command: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(work), "-o", str(tmp_path / "out"), "--rank", "4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "no rank 4" in lines[0]
    assert "1 to 3" in lines[2]
    assert not (tmp_path / "out").exists()


def test_a_rank_is_not_silently_dropped_when_a_prompt_is_baked(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(work), "-o", str(tmp_path / "out"), "--bake-prompt", "--rank", "2"]) == 2
    assert "--bake-prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
