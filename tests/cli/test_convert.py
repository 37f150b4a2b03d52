"""`surgeon convert` from the command line: what it writes, PEFT reads; what it cannot do, it says in three lines."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from surgeon import api
from surgeon.cli.main import main

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def work_folder(base: Path, folder: Path, method: str, seed: int) -> Path:
    model = api.apply(base, method, rank=4, targets="*.{q,v}_proj", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".b", ".d")):
                p.normal_(0, 0.05, generator=generator)
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def base(shared: Path) -> Path:
    return shared / "models/pystdlib-llama"


@pytest.fixture(scope="module")
def works(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("convert")
    return work_folder(base, place / "vera", "vera", 1), work_folder(base, place / "lora", "lora", 2)


def test_two_adapters_become_a_lora_that_peft_loads(
    base: Path, works: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["convert", *map(str, works), "--weights", "1,0.5", "-o", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"] is True
    assert {site["rank"] for site in report["sites"]} == {8}
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)(IDS).logits
        own = api.load(out)(input_ids=IDS).logits
    assert (found - own).abs().max() < 1e-4


def test_a_tuned_model_becomes_a_lora(
    base: Path, works: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    assert main(["merge", str(works[1]), "-o", str(tuned), "--json"]) == 0
    capsys.readouterr()
    assert main(["convert", str(tuned), "--from", str(base), "--rank", "4", "-o", str(out)]) == 0
    assert "largest error" in capsys.readouterr().err
    with torch.no_grad():
        found, expected = (api.load(folder)(input_ids=IDS).logits for folder in (out, works[1]))
    assert (found - expected).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weights", "1,x"], "cannot read the weights"),
        (["--weights", "1"], "1 weights for 2 adapters"),
        (["--combine", "ties"], "whole matrix"),
        (["--error", "2"], "the error is 2"),
        (["--rank", "-1"], "the rank is -1"),
        (["--from", "x"], "2 folders with --from"),
    ],
)
def test_wrong_use_is_three_lines_and_writes_nothing(
    options: list[str], said: str, works: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *map(str, works), *options, "-o", str(tmp_path / "out")]) in (2, 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_bases_are_refused(
    base: Path, works: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(base).apply(
        lambda module: module.weight.data.add_(1e-3) if isinstance(module, torch.nn.Linear) else None
    ).save_pretrained(other)
    second = work_folder(other, tmp_path / "second", "lora", 3)
    assert main(["convert", str(works[0]), str(second), "-o", str(tmp_path / "out")]) == 2
    assert "different bases" in capsys.readouterr().err
