"""The losses of tasks other than causal language models, and what they are means over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING, fixed_cross_entropy

from surgeon.errors import UsageError
from surgeon.loss import IGNORE

_LOSSES = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}


def task_loss(
    task: str, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], config: Any, count: Tensor | int | None
) -> Tensor:
    """The loss of a task, as transformers defines it: the mean, or the sum divided by `count` (gradient accumulation).

    Args:
        task: see `surgeon.tasks`.
        outputs: `logits`, or `start_logits` and `end_logits`.
        targets: `labels`, or `start_positions` and `end_positions`.
        config: whose `num_labels` and `problem_type` say what a classifier predicts.
        count: of labels, over all batches of a step.

    Raises:
        UsageError: the task has no loss.
    """
    if task == "multiple-choice":
        choice: Tensor = fixed_cross_entropy(outputs["logits"], targets["labels"], count)
        return choice
    if task == "seq2seq-lm":
        words: Tensor = fixed_cross_entropy(
            outputs["logits"].flatten(0, -2).float(), targets["labels"].flatten(), count
        )
        return words
    if task not in _LOSSES:
        raise UsageError(f"the task {task} has no loss", "labels", "capture the model for another --task")
    loss: Callable[..., Tensor] = LOSS_MAPPING[_LOSSES[task]]
    if task == "question-answering":
        spans = (targets["start_positions"], targets["end_positions"])
        return loss(outputs["start_logits"], outputs["end_logits"], *spans, num_items_in_batch=count)
    logits, labels = outputs["logits"], targets["labels"]
    if task == "token-classification":
        return loss(logits, labels, config, num_items_in_batch=count)
    if labels.is_floating_point() or config.problem_type == "regression":
        # transformers' mean over a batch has no form for several batches of a step.
        mean = loss(labels.to(logits.dtype), logits, config)
        return mean if count is None else mean * (labels.shape[0] / count)
    return loss(labels, logits, config, num_items_in_batch=count)


def count_items(batch: Mapping[str, Tensor], *, shifted: bool = False) -> int:
    """What the loss of a batch is a mean over: tokens with a label (`shifted`: but the first), spans, or rows."""
    if "start_positions" in batch:
        return batch["start_positions"].numel()
    labels = batch["labels"]
    if labels.dim() == 1 or labels.is_floating_point():
        return labels.shape[0]
    return int((labels[:, 1:] if shifted else labels).ne(IGNORE).sum())


def split_targets(batch: Mapping[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch on a device as inputs and targets."""
    from surgeon.examples import TARGETS

    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    inputs = {name: tensor for name, tensor in moved.items() if name not in TARGETS}
    return inputs, {name: tensor for name, tensor in moved.items() if name in TARGETS}
