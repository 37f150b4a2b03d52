"""`surgeon eval`: the adapted model and its base on the same data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgeon import api
from surgeon.cli.main import main


@pytest.fixture(scope="module")
def data(c_headers: Callable[[str, int], Path]) -> Path:
    return c_headers("heldout", 3)


def test_equals_transformers_loss(shared: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shared / "models/pystdlib-llama"
    assert main(["eval", str(base), "--data", str(data), "--max-length", "96", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for line in data.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"][:, :96]
        with torch.no_grad():
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert report["tokens"] == count
    assert report["loss"] == pytest.approx(total / count, abs=1e-4)
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert "base" not in report


def test_a_fresh_adapter_is_its_base(
    shared: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    api.apply(shared / "models/pystdlib-llama", "vera", rank=8).save(work)
    assert main(["eval", str(work), "--data", str(data), "--max-length", "48", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["base"]["loss"] == report["loss"]
    assert report["loss_change"] == 0


def test_bad_data_and_precision(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, bad = str(shared / "models/pystdlib-llama"), tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    assert main(["eval", base, "--data", str(bad)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert main(["eval", base, "--data", str(bad), "--precision", "fp8"]) == 2
    assert "fp32" in capsys.readouterr().err
