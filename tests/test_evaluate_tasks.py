"""Every task trains and is measured, by surgeon's graph and by transformers' model alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgeon
from benchmarks.zoo.encoder import save_encoder
from benchmarks.zoo.graphs import graph_of
from surgeon.errors import UsageError
from surgeon.evaluate import evaluate
from surgeon.evaluate_tasks import TaskReport, evaluate_examples
from surgeon.examples import ExampleCollator, Examples
from surgeon.model import load_model
from surgeon.samples import longest, samples_for, task_of
from surgeon.task_loss import count_items, split_targets, task_loss
from surgeon.train import train

GOOD, BAD = ["the", "film", "was", "good", "great", "lovely"], ["the", "film", "was", "bad", "dull", "awful"]
CONTEXT = "john was born in paris . mary lives in london ."
ROWS: dict[str, list[dict[str, Any]]] = {
    "sequence-classification": [
        {"text": " ".join(words[i:]), "label": name} for words, name in ((GOOD, "pos"), (BAD, "neg")) for i in range(5)
    ],
    "token-classification": [
        {"tokens": [who, "lives", "in", where], "labels": ["B-PER", "O", "O", "B-LOC"]}
        for who in ("john", "mary") for where in ("paris", "london", "france1")
    ],
    "question-answering": [
        {"question": "who lives in london ?", "context": CONTEXT, "answers": {"text": ["mary"], "answer_start": [25]}},
        {"question": "who was born ?", "context": CONTEXT, "answers": {"text": ["john"], "answer_start": [0]}},
        {"question": "what is big ?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
    ],
    "multiple-choice": [
        {"question": "what is big ?", "choices": ["the ant", "the sun"], "label": 1},
        {"question": "what is small ?", "choices": ["the ant", "the tower"], "label": 0},
    ],
}  # fmt: skip
LABELS = {"sequence-classification": ("neg", "pos"), "token-classification": ("B-LOC", "B-PER", "O")}
METRICS = {
    "sequence-classification": {"accuracy", "f1_macro", "f1"},
    "token-classification": {"accuracy", "precision", "recall", "f1"},
    "question-answering": {"exact_match", "f1"},
    "multiple-choice": {"accuracy"},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batch_loss(model: Any, data: Examples, tokenizer: Any, numbers: list[int], count: int | None) -> torch.Tensor:
    batch = ExampleCollator.of(tokenizer)([data[number] for number in numbers])
    loss: torch.Tensor = model(**batch, num_items_in_batch=count).loss
    return loss


@pytest.mark.parametrize("task", ROWS)
def test_a_task_is_learned_and_measured(encoder: Path, tmp_path: Path, task: str) -> None:
    model = surgeon.apply(encoder, "ptuning-v2", task=task, labels=LABELS.get(task, ()), tokens=4)
    data = samples_for(model, model.tokenizer, write(tmp_path / "d.jsonl", ROWS[task]))
    assert isinstance(data, Examples)
    assert data.task == task_of(model) == task
    before = evaluate(model, model.tokenizer, data, batch_size=3)
    report = train(
        model, model.tokenizer, data, out=tmp_path / "run", eval_data=data, steps=24, batch_size=4, lr=0.2,
        gradient_accumulation=2, warmup=0, scheduler="constant", progress=False,
    )  # fmt: skip
    assert isinstance(before, TaskReport)
    assert set(before.metrics) == set(report.eval_metrics) == METRICS[task]
    assert report.eval_loss is not None
    assert report.eval_loss < 0.7 * before.loss
    after = evaluate(model, model.tokenizer, data, batch_size=100)
    assert after.loss == pytest.approx(report.eval_loss, rel=1e-5)
    assert after.metrics == pytest.approx(report.eval_metrics)  # type: ignore[union-attr]
    assert all(report.eval_metrics[name] >= value for name, value in before.metrics.items() if name != "f1")


@pytest.mark.parametrize("task", ROWS)
def test_losses_are_those_of_transformers(encoder: Path, tmp_path: Path, task: str) -> None:
    names = LABELS.get(task, ())
    model = surgeon.apply(encoder, "lora", task=task, labels=names, targets="*.query")
    name = "AutoModelFor" + "".join(word.capitalize() for word in task.split("-"))
    options = {"num_labels": len(names)} if names else {}
    twin = getattr(transformers, name).from_pretrained(encoder, **options).eval()
    held = model.state_dict()
    twin.load_state_dict({key: held[key] for key in twin.state_dict() if key in held}, strict=False)
    data = samples_for(model, model.tokenizer, write(tmp_path / "d.jsonl", ROWS[task]))
    assert isinstance(data, Examples)
    both = [batch_loss(one, data, model.tokenizer, [0, 1], None) for one in (model, twin)]
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-6)
    ours, theirs = (evaluate(one, model.tokenizer, data) for one in (model, twin))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.metrics == theirs.metrics  # type: ignore[union-attr]
    # Two batches of a step, each divided by the step's count, make the mean over both.
    count = 2 * count_items(ExampleCollator.of(model.tokenizer)([data[0]]))
    half, whole = (batch_loss(model, data, model.tokenizer, [0], n) for n in (count, None))
    torch.testing.assert_close(2 * half, whole, rtol=1e-5, atol=1e-6)


def test_a_regression_is_measured_by_its_errors(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(GOOD[i:]), "label": i / 2} for i in range(5)]
    model = surgeon.apply(encoder, "lora", task="sequence-classification", labels=("score",), targets="*.query")
    data = samples_for(model, model.tokenizer, write(tmp_path / "d.jsonl", rows))
    report = train(
        model, model.tokenizer, data, out=tmp_path / "run", eval_data=data, steps=10, batch_size=2, lr=1e-2,
        gradient_accumulation=2, progress=False,
    )  # fmt: skip
    assert set(report.eval_metrics) >= {"mse", "mae"}
    assert report.eval_loss == pytest.approx(report.eval_metrics["mse"], rel=1e-4)
    assert report.loss < report.first_loss


def test_pairs_of_texts_by_an_encoder_decoder() -> None:
    graph = graph_of("t5")
    model = load_model(graph)
    items = tuple({"input_ids": [5, 6, 7, 1][:n], "labels": [9, 8, 1]} for n in (4, 3, 2))
    tokenizer = _Words()
    data = Examples("seq2seq-lm", items)
    found = evaluate_examples(model, tokenizer, data, batch_size=2, generate=True)
    assert set(found.metrics) == {"accuracy", "perplexity", "exact_match"}
    batch = ExampleCollator.of(tokenizer)(items)
    inputs, targets = split_targets(batch, torch.device("cpu"))
    expected = model(**inputs, **targets).loss
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    logits = {"logits": model(**inputs, decoder_input_ids=torch.tensor([[0, 9, 8]] * 3)).logits}
    assert task_loss("seq2seq-lm", logits, targets, model.config, None).item() == pytest.approx(found.loss, rel=1e-5)


class _Words:
    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(i) for i in row if i > 1) for row in ids.tolist()]


def test_lengths_leave_room_for_the_prefix(encoder: Path) -> None:
    model = surgeon.apply(encoder, "ptuning-v2", task="sequence-classification", tokens=10)
    assert longest(model, model.tokenizer) == 54
    long = [{"text": "the " * 200, "label": label} for label in (0, 1)]
    data = samples_for(model, model.tokenizer, [_row(row) for row in long])
    assert isinstance(data, Examples)
    assert data.length(0) == 54
    assert evaluate(model, model.tokenizer, data).loss > 0


def _row(values: dict[str, Any]) -> Any:
    from surgeon.data import Row

    return Row(values, Path("d.jsonl"), 1)


def test_bad_input(encoder: Path) -> None:
    model = surgeon.apply(encoder, "lora", task="sequence-classification", targets="*.query")
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate_examples(model, model.tokenizer, Examples("sequence-classification", ()))
    with pytest.raises(UsageError, match="no loss"):
        task_loss("features", {}, {}, model.config, None)
