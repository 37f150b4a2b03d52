"""Loss and metrics of classifiers, question answering, multiple choice and pairs on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from surgeon import metrics
from surgeon.errors import CheckFailed, UsageError
from surgeon.examples import ExampleCollator, Examples
from surgeon.loss import IGNORE
from surgeon.task_loss import count_items, split_targets, task_loss


@dataclass(frozen=True)
class TaskReport:
    """`loss` is the task's, per label; `examples` counts rows, or questions; `metrics` are those of the task.

    sequence-classification: accuracy, f1_macro, f1 (of two classes); a regression: mse, mae, pearson, spearman.
    token-classification: accuracy, and precision, recall, f1 of entities, or f1_macro. question-answering: exact_match,
    f1. multiple-choice: accuracy. seq2seq-lm: accuracy of tokens, perplexity, and exact_match where asked for.
    """

    loss: float
    examples: int
    metrics: dict[str, float]

    @property
    def accuracy(self) -> float | None:
        """The share that is right, for tasks that have it."""
        return self.metrics.get("accuracy")


@dataclass
class _Seen:
    """What the batches gave, by sample."""

    outputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    loss: float = 0.0
    items: int = 0

    def all(self, name: str) -> list[Tensor]:
        """One output of every sample, in their order."""
        return [self.outputs[number][name] for number in range(len(self.outputs))]


@torch.no_grad()
def evaluate_examples(
    model: torch.nn.Module,
    tokenizer: Any,
    data: Examples,
    *,
    batch_size: int = 8,
    precision: str = "fp32",
    generate: bool = False,
) -> TaskReport:
    """The task's loss and metrics over `data`; see `surgeon.evaluate.evaluate`.

    `generate` adds the share of pairs whose target the model writes exactly, greedily (seq2seq-lm).
    """
    if not len(data):
        raise UsageError("there is nothing to evaluate", data.task, "give at least one row")
    seen = _Seen()
    was_training = model.training
    model.eval()
    try:
        for numbers in _batches(data, batch_size):
            _run(model, tokenizer, data, numbers, precision, seen)
        found = _measured(data, seen)
        if generate and data.task == "seq2seq-lm":
            found["exact_match"] = _written(model, tokenizer, data, batch_size)
    finally:
        model.train(was_training)
    loss = seen.loss / max(seen.items, 1)
    if not math.isfinite(loss):
        raise CheckFailed(f"the evaluation loss is {loss}", "evaluate", "check the adapter's and the base's weights")
    if data.task == "seq2seq-lm":
        found["perplexity"] = math.exp(loss) if loss < 700 else math.inf
    return TaskReport(loss, len(data.questions) or len(data), found)


def _batches(data: Examples, size: int) -> Iterator[list[int]]:
    """Samples of similar length together, so that little is computed on padding."""
    order = sorted(range(len(data)), key=data.length, reverse=True)
    return (order[at : at + size] for at in range(0, len(order), size))


def _run(
    model: torch.nn.Module, tokenizer: Any, data: Examples, numbers: list[int], precision: str, seen: _Seen
) -> None:
    batch = ExampleCollator.of(tokenizer, model.config)([data[number] for number in numbers])
    device = next(model.parameters()).device
    inputs, targets = split_targets(batch, device)
    if data.task == "seq2seq-lm":
        from surgeon.model import shifted_right

        inputs["decoder_input_ids"] = shifted_right(targets["labels"], model.config)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        result = model(**inputs)
    names = ("start_logits", "end_logits") if data.task == "question-answering" else ("logits",)
    outputs = {name: getattr(result, name).float() for name in names}
    seen.loss += float(task_loss(data.task, outputs, targets, model.config, 1).double())
    seen.items += count_items(batch)
    for row, number in enumerate(numbers):
        own = {name: output[row] for name, output in outputs.items()}
        if data.task in ("token-classification", "seq2seq-lm"):
            counts = targets["labels"][row] != IGNORE
            own = {"guess": own["logits"][counts].argmax(-1), "right": targets["labels"][row][counts]}
        seen.outputs[number] = {name: tensor.cpu() for name, tensor in own.items()}


def _measured(data: Examples, seen: _Seen) -> dict[str, float]:
    if data.task == "question-answering":
        return metrics.answering(data.questions, seen.all("start_logits"), seen.all("end_logits"))
    if data.task in ("token-classification", "seq2seq-lm"):
        guessed, gold = seen.all("guess"), seen.all("right")
        if data.labels is None:
            return {"accuracy": float((torch.cat(guessed) == torch.cat(gold)).float().mean())}
        return metrics.tagging([row.tolist() for row in guessed], [row.tolist() for row in gold], data.labels)
    logits = torch.stack(seen.all("logits"))
    right = torch.tensor([data[number]["labels"] for number in range(len(data))])
    if data.labels is None:
        return {"accuracy": float((logits.argmax(-1) == right).float().mean())}
    if data.labels.regression:
        return metrics.regression(logits.flatten(), right.float())
    return metrics.classification(logits.argmax(-1), right, data.labels)


def _written(model: Any, tokenizer: Any, data: Examples, batch_size: int) -> float:
    """The share of samples whose labels greedy generation gives, special tokens apart."""
    collate, hits = ExampleCollator.of(tokenizer, model.config), 0
    device = next(model.parameters()).device
    for numbers in _batches(data, batch_size):
        inputs, targets = split_targets(collate([data[number] for number in numbers]), device)
        longest = targets["labels"].shape[1]
        written = model.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
        right = targets["labels"].masked_fill(targets["labels"] == IGNORE, tokenizer.pad_token_id or 0)
        texts = [tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (written, right)]
        hits += sum(one == other for one, other in zip(*texts, strict=True))
    return hits / len(data)
