"""Samples of classifiers, of question answering and of pairs: what goes in, what is right, and batches of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgeon.labels import Labels
from surgeon.loss import IGNORE

TARGETS = ("labels", "start_positions", "end_positions")
"""The fields of a sample that say what is right; the others are the model's inputs."""


@dataclass(frozen=True)
class Question:
    """A question, and the overlapping windows its context was cut into.

    Attributes:
        context: the whole context.
        answers: the right ones; none for a question that the context does not answer.
        windows: positions of its windows among the samples.
        offsets: per window and token, where in the context the token stands; None for tokens of anything else.
        none_at: per window, the token that stands for "no answer".
    """

    context: str
    answers: tuple[str, ...]
    windows: tuple[int, ...]
    offsets: tuple[tuple[tuple[int, int] | None, ...], ...]
    none_at: tuple[int, ...]


@dataclass(frozen=True)
class Examples:
    """The samples of a data set for one task, each a mapping of lists of ids and targets.

    `input_ids` are `[t]`, for multiple choice `[choices, t]`; `labels` a class, a number, or `[t]`; spans are
    `start_positions` and `end_positions`. `truncated` counts rows that were cut to the maximum length.
    """

    task: str
    items: tuple[Mapping[str, Any], ...]
    labels: Labels | None = None
    truncated: int = 0
    questions: tuple[Question, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.items[index]

    def length(self, index: int) -> int:
        """The tokens of a sample, of its longest choice if it has choices."""
        ids = self.items[index]["input_ids"]
        return max(map(len, ids)) if isinstance(ids[0], list) else len(ids)

    @property
    def digest(self) -> str:
        """A hash of all samples: the same data or not."""
        sha = hashlib.sha256(json.dumps(self.labels.names if self.labels else []).encode())
        for item in self.items:
            sha.update(json.dumps(dict(item)).encode())
        return sha.hexdigest()

    def summary(self) -> str:
        """One line for people: samples, longest, classes, and what was cut."""
        parts = [f"{len(self):,} samples for {self.task}, up to {max(map(self.length, range(len(self)))):,} tokens"]
        if self.questions:
            none = sum(not question.answers for question in self.questions)
            parts.append(f"{len(self.questions):,} questions" + (f", {none:,} without an answer" if none else ""))
        if self.labels and not self.labels.regression:
            names = self.labels.names
            parts.append(f"{len(names)} classes: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}")
        if self.truncated:
            parts.append(f"{self.truncated:,} cut to the maximum length")
        return "; ".join(parts)


@dataclass(frozen=True)
class ExampleCollator:
    """Batches samples into tensors, padded on the right: `[b, t]`, for multiple choice `[b, choices, t]`."""

    pad_id: int
    pad_type: int = 0

    @classmethod
    def of(cls, tokenizer: Any, config: Any = None) -> ExampleCollator:
        """The collator of a tokenizer: its padding token, else its end token, else id 0 (all masked anyway).

        A config that names a padding token comes first: decoders find the last token of a sequence by it.
        """
        own = getattr(config, "pad_token_id", None)
        ids = (own, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(i for i in ids if i is not None), getattr(tokenizer, "pad_token_type_id", 0) or 0)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of `samples`."""
        fills = {"input_ids": self.pad_id, "token_type_ids": self.pad_type, "labels": IGNORE}
        batch = {name: _stacked([sample[name] for sample in samples], fills.get(name, 0)) for name in samples[0]}
        masks = [_ones(sample["input_ids"]) for sample in samples]
        return {**batch, "attention_mask": _stacked(masks, 0)}


def _ones(ids: Any) -> Any:
    return [_ones(item) for item in ids] if isinstance(ids, list) else 1


def _stacked(values: list[Any], fill: int) -> Tensor:
    """Numbers as they are; lists, and lists of lists, padded at the end to the longest."""
    if not isinstance(values[0], list):
        return torch.tensor(values)
    rows = [row for value in values for row in value] if isinstance(values[0][0], list) else values
    width = max(map(len, rows))
    padded = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    return padded if rows is values else padded.view(len(values), -1, width)
