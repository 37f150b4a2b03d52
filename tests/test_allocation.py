"""Runs in which ranks move: resumed, saved, merged, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon import api, fold, run
from surgeon.errors import UsageError
from surgeon.hook import Hook
from surgeon.model import load_model
from surgeon.passes import make
from surgeon.passes.adalora import AdaLora


def rows(folder: Path) -> Path:
    data = folder / "data.jsonl"
    data.write_text('{"text": "def add(a, b):\\n    return a + b\\n"}\n' * 8)
    return data


@pytest.fixture(scope="module")
def base(repo: Path) -> Any:
    """The graph of the shared Llama and its tokenizer."""
    folder = repo.parent / "shared/models/pystdlib-llama"
    return api.read(folder), api.tokenizer_of(folder)


def small_model(base: Any, **options: Any) -> Any:
    defaults = {"rank": 4, "target_rank": 2, "alpha": 8, "targets": "*.{q,v}_proj", "t_init": 2, "t_final": 4}
    model = load_model(run.apply(base[0], make("adalora", **{**defaults, **options})))
    model.tokenizer = base[1]
    return model


OPTIONS: dict[str, Any] = {"batch_size": 2, "lr": 1e-2, "progress": False, "steps": 10}


@pytest.mark.parametrize("shrink", ["end", "eager"])
def test_a_run_resumed_before_and_after_ranks_settle_is_the_uninterrupted_one(
    base: Any, tmp_path: Path, shrink: str
) -> None:
    from surgeon.train import train

    def go(out: str, stop: int = 99, resume: bool = False) -> Any:
        model = small_model(base, shrink=shrink)
        options = {**OPTIONS, "save_every": 4, "resume": resume}
        train(model, model.tokenizer, rows(tmp_path), out=tmp_path / out, hooks=[Stop(stop)], **options)
        return model

    whole = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("run", stop=5)
    resumed = [go("run", resume=True)]
    if shrink == "end":
        shutil.rmtree(tmp_path / "run/checkpoint-10")
        resumed += [go("run", resume=True), go("run", resume=True)]  # from step 8, and of the whole run
    expected = json.loads((tmp_path / "whole/ranks.json").read_text())
    for again in resumed:
        for name, p in whole.named_parameters():
            assert torch.equal(p, again.get_parameter(name)), name
        assert again.graph.text() == whole.graph.text()
        assert again.graph.applied == whole.graph.applied
    found = json.loads((tmp_path / "run/ranks.json").read_text())
    assert found["ranks"] == expected["ranks"]
    assert found["triplets"] == {"start": 4 * len(found["ranks"]), "end": 2 * len(found["ranks"])}
    assert (tmp_path / "run/ranks.png").read_bytes()[:4] == b"\x89PNG"
    steps = [shrunk["step"] for shrunk in found["shrinks"]]
    assert steps == [6] if shrink == "end" else set(steps) > {3, 4} and max(steps) <= 6
    assert sum(shrunk["removed"] for shrunk in found["shrinks"]) == found["triplets"]["end"]
    assert all(0 < shrunk["importance"] < 1 for shrunk in found["shrinks"])


class Stop(Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, model: Any, optimizer: Any, step: int, total: int) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def test_a_trained_adapter_is_saved_loaded_and_merged(base: Any, tmp_path: Path) -> None:
    from surgeon.train import train

    model = small_model(base, t_final=0, rank=3, target_rank=1)
    report = train(model, model.tokenizer, rows(tmp_path), out=tmp_path / "run", **OPTIONS, gradient_accumulation=2)
    assert report.steps == 10
    ranks = json.loads((tmp_path / "run/ranks.json").read_text())["ranks"]
    assert sum(ranks.values()) == len(ranks)
    (step,) = model.graph.applied
    assert isinstance(step, AdaLora)
    assert {path: step.rank_at(path) for path in ranks} == ranks
    model.save(tmp_path / "work")
    again = surgeon.load(tmp_path / "work")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, found = model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits
        merged = load_model(fold.fold(again.trained()))(input_ids=ids).logits
    assert torch.equal(expected, found)
    assert (merged - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_a_target_equal_to_the_rank_trains_and_prunes_nothing(base: Any, tmp_path: Path) -> None:
    from surgeon.train import train

    model = small_model(base, target_rank=4, t_init=0.5, t_final=0.5)
    train(model, model.tokenizer, rows(tmp_path), out=tmp_path / "run", **{**OPTIONS, "steps": 2})
    assert json.loads((tmp_path / "run/ranks.json").read_text())["shrinks"] == []
    assert model.graph.applied[0].ranks == ()


def test_an_empty_schedule_is_refused_before_anything_is_written(base: Any, tmp_path: Path) -> None:
    from surgeon.train import train

    model = small_model(base, t_init=6, t_final=4)
    with pytest.raises(UsageError, match=r"t_init \+ t_final are 6 \+ 4 of 10 steps") as caught:
        train(model, model.tokenizer, rows(tmp_path), out=tmp_path / "run", **OPTIONS)
    assert caught.value.where
    assert caught.value.hint
    assert not (tmp_path / "run").exists()
