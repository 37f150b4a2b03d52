"""Loss, perplexity and next-token accuracy of a model on held-out data, weighted by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.data import Collator
from surgeon.errors import CheckFailed, UsageError
from surgeon.evaluate_tasks import TaskReport, evaluate_examples
from surgeon.examples import Examples
from surgeon.loss import IGNORE
from surgeon.packed import packed_products
from surgeon.render import Rendered
from surgeon.samples import Data, samples_for

ROWS = 512
"""Logit rows turned into fp32 at once."""


@dataclass(frozen=True)
class EvalReport:
    """`loss` is nats per trained token, `perplexity` its exponential, `accuracy` the share predicted first."""

    loss: float
    perplexity: float
    tokens: int
    accuracy: float


@torch.no_grad()
@packed_products()
def evaluate(
    model: torch.nn.Module,
    tokenizer: Any,
    data: Data | str | Path,
    *,
    batch_size: int = 8,
    max_length: int | None = None,
    precision: str = "fp32",
    generate: bool = False,
) -> EvalReport | TaskReport:
    """The mean negative log-likelihood over the trained tokens of `data` (a file or samples); other tasks' metrics.

    Runs in evaluation mode, draws no random numbers, and leaves the model in the mode it was in. `precision` "bf16"
    runs the forward pass under autocast; `generate` also compares what a seq2seq model writes. Raises UsageError for
    bad data, CheckFailed if the loss is not finite.
    """
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} samples is empty", "batch_size", "use at least 1")
    rendered = samples_for(model, tokenizer, data, max_length)
    if isinstance(rendered, Examples):
        return evaluate_examples(
            model, tokenizer, rendered, batch_size=batch_size, precision=precision, generate=generate
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nll, hits, tokens = 0.0, 0, 0
    try:
        for batch in _batches(rendered, Collator.of(tokenizer), batch_size):
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = on_device.pop("labels")
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = model(**on_device).logits
            parts = _scores(logits, labels)
            nll, hits, tokens = nll + parts[0], hits + parts[1], tokens + parts[2]
    finally:
        model.train(was_training)
    loss = nll / tokens
    if not math.isfinite(loss):
        raise CheckFailed(f"the evaluation loss is {loss}", "evaluate", "check the adapter's and the base's weights")
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return EvalReport(loss, perplexity, tokens, hits / tokens)


def _batches(data: Rendered, collator: Collator, size: int) -> Sequence[dict[str, Tensor]]:
    """The batches, samples of similar length together, so that little is computed on padding."""
    order = sorted(range(len(data)), key=lambda i: len(data.samples[i].input_ids), reverse=True)
    return [collator([data[i] for i in order[at : at + size]]) for at in range(0, len(order), size)]


def _scores(logits: Tensor, labels: Tensor) -> tuple[float, int, int]:
    """Summed NLL, correct first guesses and count over the labels `[b, t]` that count, `logits [b, t, v]`."""
    targets = labels[:, 1:]
    keep = targets != IGNORE
    wanted, rows = targets[keep], keep.nonzero()
    nll, hits = 0.0, 0
    for place, target in zip(rows.split(ROWS), wanted.split(ROWS), strict=True):
        chunk = logits[place[:, 0], place[:, 1]].float()
        nll += torch.nn.functional.cross_entropy(chunk, target, reduction="none").double().sum().item()
        hits += int((chunk.argmax(-1) == target).sum())
    return nll, hits, int(wanted.numel())
