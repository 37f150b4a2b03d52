"""Rows to tokens and labels: what the model reads, and which of it the loss counts (the other labels are -100)."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from surgeon.chat_template import chat_tokens
from surgeon.data import Row, form_of, load_rows
from surgeon.errors import UsageError
from surgeon.loss import IGNORE

# The prompt of Stanford Alpaca, which data in this form was written for.
ALPACA = (
    "Below is an instruction that describes a task{and_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


@dataclass(frozen=True)
class Sample:
    """Token ids and labels of equal length; a label is its token's id, or -100 where the token is only read."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss counts: the first one is never predicted."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Rendered:
    """The samples of a data set, and how many rows were cut to `max_length` or dropped for having nothing to learn."""

    samples: tuple[Sample, ...]
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sample = self.samples[index]
        return {"input_ids": sample.input_ids, "labels": sample.labels}

    @property
    def digest(self) -> str:
        """A hash of all ids and labels: the same data or not."""
        parts = ((sample.input_ids, sample.labels) for sample in self.samples)
        sha = hashlib.sha256()
        for part in parts:
            sha.update(json.dumps(part).encode())
        return sha.hexdigest()

    def summary(self) -> str:
        """One line for people: samples, tokens, trained tokens, and what was cut or dropped."""
        tokens = sum(len(sample.input_ids) for sample in self.samples)
        trained = sum(sample.trained_tokens for sample in self.samples)
        line = f"{len(self):,} samples, {tokens:,} tokens, {trained:,} of them trained"
        cut = f"; {self.truncated:,} cut to the maximum length" if self.truncated else ""
        return line + cut + (f"; {self.dropped:,} dropped with no trained token left" if self.dropped else "")


def load_data(path: str | Path, tokenizer: Any, max_length: int | None = None) -> Rendered:
    """The samples of a data file. Raises UsageError as `load_rows` and `render_rows` do."""
    return render_rows(load_rows(path), tokenizer, max_length)


def render_rows(rows: Sequence[Row], tokenizer: Any, max_length: int | None = None) -> Rendered:
    """The samples of `rows`, cut to `max_length` tokens. Raises UsageError if no row has a trained token left."""
    if max_length is not None and max_length < 2:
        raise UsageError(f"a maximum length of {max_length} leaves nothing to predict", "max_length", "use at least 2")
    samples: list[Sample] = []
    truncated = dropped = 0
    for row in rows:
        sample = render(row, tokenizer)
        if max_length is not None and len(sample.input_ids) > max_length:
            truncated += 1
            sample = Sample(sample.input_ids[:max_length], sample.labels[:max_length])
        if sample.trained_tokens:
            samples.append(sample)
        else:
            dropped += 1
    if not samples:
        what = f"no row has a token to train on ({dropped} dropped, {truncated} cut to {max_length} tokens)"
        where = str(rows[0].file) if rows else "an empty list of rows"
        raise UsageError(what, where, "check that answers are not empty, or raise the maximum length")
    return Rendered(tuple(samples), truncated, dropped)


def render(row: Row, tokenizer: Any) -> Sample:
    """One row as a sample: chat trains on assistant turns, alpaca and completion on the answer, text on everything."""
    form = form_of(row)
    if form == "chat":
        ids, said = chat_tokens(row, tokenizer)
        return Sample(ids, [i if trained else IGNORE for i, trained in zip(ids, said, strict=True)])
    if form == "alpaca":
        given = _string(row, "input") if "input" in row.values else ""
        prompt = ALPACA.format(
            and_input=", paired with an input that provides further context" if given else "",
            instruction=_string(row, "instruction"),
            input=f"### Input:\n{given}\n\n" if given else "",
        )
        return _completion(prompt, _string(row, "output"), tokenizer)
    if form == "completion":
        return _completion(_string(row, "prompt"), _string(row, "completion"), tokenizer)
    ids = _ended(_with_start(_string(row, "text"), tokenizer), tokenizer)
    return Sample(ids, list(ids))


def _string(row: Row, key: str) -> str:
    value = row.values[key]
    if not isinstance(value, str):
        raise UsageError(f"`{key}` is not a string, but a {type(value).__name__}", row.where, f"make `{key}` a string")
    return value


def _with_start(text: str, tokenizer: Any) -> list[int]:
    """The ids of `text` with the start token the tokenizer adds, once, and without the end token it may add."""
    ids: list[int] = list(tokenizer(text)["input_ids"])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is not None and ids[:2] == [start, start]:
        ids = ids[1:]
    return ids[:-1] if end is not None and ids[-1:] == [end] else ids


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _completion(prompt: str, completion: str, tokenizer: Any) -> Sample:
    before = _with_start(prompt, tokenizer)
    whole = _with_start(prompt + completion, tokenizer)
    if whole[: len(before)] != before:
        # A token spans the border: generation starts from the prompt's own tokens, so training does too.
        whole = before + tokenizer(completion, add_special_tokens=False)["input_ids"]
    ids = _ended(whole, tokenizer) if completion else whole
    return Sample(ids, [IGNORE] * len(before) + ids[len(before) :])


def shown_sample(sample: Sample, tokenizer: Any, *, max_tokens: int = 400) -> Text:
    """The sample as text for a terminal: trained tokens bold green, tokens that are only read dim."""
    text = Text()
    for trained, part in _runs(sample, tokenizer, max_tokens):
        text.append(part, style="bold green" if trained else "dim")
    return text.append(_rest(sample, max_tokens), style="italic")


def plain_sample(sample: Sample, tokenizer: Any, *, max_tokens: int = 400) -> str:
    """The sample as text for logs: trained tokens stand between ⟦ and ⟧."""
    runs = _runs(sample, tokenizer, max_tokens)
    return "".join(f"⟦{part}⟧" if trained else part for trained, part in runs) + _rest(sample, max_tokens)


def _runs(sample: Sample, tokenizer: Any, max_tokens: int) -> list[tuple[bool, str]]:
    pairs = list(zip(sample.input_ids, sample.labels, strict=True))[:max_tokens]
    groups = itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE)
    return [(trained, tokenizer.decode([i for i, _ in group])) for trained, group in groups]


def _rest(sample: Sample, max_tokens: int) -> str:
    hidden = len(sample.input_ids) - max_tokens
    return f" … {hidden} more tokens" if hidden > 0 else ""
