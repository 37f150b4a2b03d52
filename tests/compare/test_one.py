"""One run of a comparison for real, on a tiny encoder: what it measures, and PEFT's side of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.encoder import save_encoder
from surgeon.compare.one import One
from surgeon.compare.schedule import BASE, BESIDE, PEFT, SEARCH, SURGEON, Run
from surgeon.compare.search import MOST_RATES
from surgeon.compare.settings import Settings
from surgeon.errors import UnsupportedError

LORA = (("targets", "all-linear"), ("rank", 4), ("alpha", 8.0))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    place = tmp_path_factory.mktemp("compare")
    model = save_encoder(place / "encoder")
    draw, kinds = random.Random(0), [("good great lovely", "pos"), ("bad dull awful", "neg")]
    rows = dict.fromkeys(
        (" ".join([draw.choice(words.split()), *draw.choices(["film", "tower", "house", "river"], k=3)]), label)
        for words, label in kinds * 40
    )
    for name, part in (("train", list(rows)[:40]), ("heldout", list(rows)[40:])):
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in part)
        (place / f"{name}.jsonl").write_text("".join(lines))
    files = (str(place / f"{name}.jsonl") for name in ("train", "heldout"))
    return Settings(str(model), *files, "sequence-classification", 8, 5, 8, 32)


def result(setting: Settings, run: Run, lr: float = 0.05) -> dict[str, Any]:
    return One(setting, run, lr).result()


def test_the_base_and_the_search(setting: Settings) -> None:
    base = result(setting, Run(BASE))
    assert 0.3 < base["loss"] < 1.5
    assert base["seconds_per_step"] > 0
    found = result(setting, Run(SEARCH, "lora", LORA))
    assert 3 <= len(found["tried"]) <= MOST_RATES
    assert found["whole"][f"{found['lr']:.3g}"] == min(found["whole"].values())


def test_a_method_and_what_is_left_of_it(setting: Settings) -> None:
    found = result(setting, Run(SURGEON, "lora", LORA))
    assert found["train_loss"] > 0
    assert found["after"]["merged"] == pytest.approx(found["loss"], rel=1e-4)
    assert found["after"]["onnx"] == pytest.approx(found["loss"], rel=1e-4)
    assert found["after"]["4bit"] == pytest.approx(found["loss"], rel=0.3)
    assert found["stored"] == found["trained"]
    assert found["checkpoint_bytes"] > 4 * found["stored"]
    assert "lora" in found["diff"]
    again = result(setting, Run(SURGEON, "lora", LORA, 1))
    assert "after" not in again
    assert again["loss"] != found["loss"]


def test_what_is_no_adapter(setting: Settings) -> None:
    head, full = (result(setting, Run(SURGEON, name)) for name in ("head", "full"))
    assert head["trained"] == 2 * 17
    assert full["trained"] > 5000
    for found in (head, full):
        assert found["after"]["merged"] == pytest.approx(found["loss"], rel=1e-4)
        assert found["after"]["onnx"] == pytest.approx(found["loss"], rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize(("method", "options"), [("lora", LORA), ("ptuning_v2", (("tokens", 4), ("dropout", 0.0)))])
def test_peft_learns_the_same(setting: Settings, method: str, options: Any) -> None:
    """The same first values, data, order and rate through the same loop: the same loss."""
    sides = [result(setting, Run(kind, method, options)) for kind in (SURGEON, PEFT)]
    assert sides[0]["trained"] == sides[1]["trained"]
    assert sides[0]["loss"] == pytest.approx(sides[1]["loss"], rel=1e-3)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize(
    ("method", "options", "beside"),
    [("lora", LORA, True), ("adalora", (("targets", "query"),), True), ("dylora", LORA, False), ("full", (), False)],
)
def test_steps_are_timed_in_turn(setting: Settings, method: str, options: Any, beside: bool) -> None:
    found = result(setting, Run(BESIDE, method, options))
    assert 0 < found["seconds_per_step"] < 5
    assert ("time_ratio" in found) == beside
    assert 0.05 < found.get("time_ratio", 1.0) < 20


def test_what_peft_does_not_train_is_not_compared(setting: Settings) -> None:
    """Its files hold a DyLoRA as a LoRA, which is another method."""
    with pytest.raises(UnsupportedError, match="PEFT has no such method"):
        result(setting, Run(PEFT, "dylora", LORA))
    over_integers = (("targets", "query"), ("rank", 4), ("group", 8))
    assert "GPTQModel's checkpoints" in result(setting, Run(PEFT, "qa_lora", over_integers))["failed"]


@pytest.mark.filterwarnings("ignore")  # PEFT's and bitsandbytes' own
def test_peft_learns_the_same_over_bitsandbytes(shared: Path, tmp_path: Path) -> None:
    """QLoRA, at widths that are multiples of 64: bitsandbytes decodes others wrongly on a CPU."""
    lines = (shared / "data/c_headers.heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:20]
    files = [tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"]
    for file, part in zip(files, (lines[:16], lines[16:]), strict=True):
        file.write_text("".join(part), encoding="utf-8")
    model = str(shared / "models" / "pystdlib-llama")
    setting = Settings(model, *map(str, files), "", 6, 2, 4, 32, onnx=False)
    ours, theirs = (result(setting, Run(kind, "qlora", LORA), 0.01) for kind in (SURGEON, PEFT))
    assert ours["trained"] == theirs["trained"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
