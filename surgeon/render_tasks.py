"""Rows to samples for classifiers, multiple choice and pairs of texts; the form of a row is told by its keys."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from surgeon.data import Row, cells, text_in
from surgeon.errors import UsageError
from surgeon.examples import Examples
from surgeon.labels import LABELLED, Labels, label_in, labels_of
from surgeon.loss import IGNORE
from surgeon.render_squad import render_questions

Item = tuple[dict[str, Any], bool]
"""A sample, and whether it was cut."""

TEXTS = (
    ("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("text",), ("sentence",),
)  # fmt: skip
"""The keys of the text, or pair of texts, of a row to classify, in order of precedence."""
PAIRS = (("source", "target"), ("prompt", "completion"), ("instruction", "output"))
"""The keys of a text and what is to be made of it."""
_ENDING = re.compile(r"(?:ending|choice)_?(\d+)")
_CHOICES, _ANSWER = ("choices", "endings", "options"), ("label", "answer")


def render_examples(
    rows: Sequence[Row], tokenizer: Any, task: str, config: Any, max_length: int | None = None
) -> Examples:
    """The samples of `rows` for a task, cut to `max_length` tokens.

    Raises UsageError for a row that lacks something or has a label the model does not know, with file and line.
    """
    if not rows:
        raise UsageError("the data is empty: no rows", "an empty list of rows", "give at least one row")
    if max_length is not None and max_length < 8:
        raise UsageError(f"a maximum length of {max_length} leaves no text", "max_length", "use at least 8")
    if task == "question-answering":
        return render_questions(rows, tokenizer, max_length)
    if task not in _RENDERERS:
        raise UsageError(f"the task {task} does not train", str(rows[0].file), f"one of {', '.join(_RENDERERS)}")
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise UsageError("a model with several labels a row is not supported", "problem_type", "train it with others")
    labels = labels_of(config) if task in LABELLED else None
    words = _for_words(tokenizer) if task == "token-classification" else tokenizer
    made = [_RENDERERS[task](row, words, labels, max_length) for row in rows]
    _check_choices(rows, made)
    return Examples(task, tuple(item for item, _ in made), labels, sum(cut for _, cut in made))


def encoded(tokenizer: Any, *texts: Any, max_length: int | None, cut: Any = True, **options: Any) -> tuple[Any, bool]:
    """The tokenizer's encoding of a text or pair, and whether it was cut to `max_length`."""
    whole = tokenizer(*texts, verbose=False, **options)
    if max_length is None or len(whole["input_ids"]) <= max_length:
        return whole, False
    return tokenizer(*texts, truncation=cut, max_length=max_length, verbose=False, **options), True


def inputs_in(encoding: Any) -> dict[str, Any]:
    """What a model reads of an encoding; masks are made with the batch."""
    return {name: list(encoding[name]) for name in ("input_ids", "token_type_ids") if name in encoding}


def _classified(row: Row, tokenizer: Any, labels: Labels | None, max_length: int | None) -> Item:
    keys = next((keys for keys in TEXTS if all(key in row.values for key in keys)), None)
    if keys is None:
        raise _no_form(row, "`text`, `label`, or `text_a`, `text_b`, `label`")
    encoding, cut = encoded(tokenizer, *(text_in(row, key) for key in keys), max_length=max_length)
    assert labels is not None
    given = label_in(row, "sequence-classification")
    label = _number(given, row) if labels.regression else labels.id_of(given, row.where)
    return inputs_in(encoding) | {"labels": label}, cut


def _number(value: Any, row: Row) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"the label {value!r} is no number", row.where, "the model predicts numbers: give one a row")
    return number


def _tagged(row: Row, tokenizer: Any, labels: Labels | None, max_length: int | None) -> Item:
    tokens, given = cells(row, "tokens"), label_in(row, "token-classification")
    if len(tokens) != len(given) or not tokens:
        what = f"the row has {len(tokens)} tokens and {len(given)} labels"
        raise UsageError(what, row.where, "give one label per token")
    if not all(isinstance(token, str) for token in tokens):
        raise UsageError("`tokens` holds something that is no string", row.where, "make every token a string")
    assert labels is not None
    ids = [IGNORE if label == IGNORE else labels.id_of(label, row.where) for label in given]
    encoding, cut = encoded(tokenizer, tokens, max_length=max_length, is_split_into_words=True)
    words = encoding.word_ids()
    first = [word is not None and word != before for word, before in zip(words, [None, *words[:-1]], strict=True)]
    marked = [ids[word] if new else IGNORE for word, new in zip(words, first, strict=True)]
    return inputs_in(encoding) | {"labels": marked}, cut


def _for_words(tokenizer: Any) -> Any:
    """A tokenizer that takes words: byte-level ones must put a space before each."""
    if not tokenizer.is_fast:
        what = "the tokenizer cannot say which word a piece belongs to"
        raise UsageError(what, type(tokenizer).__name__, "use a checkpoint with a tokenizer.json")
    if getattr(tokenizer, "add_prefix_space", None) is False:
        return type(tokenizer).from_pretrained(tokenizer.name_or_path, add_prefix_space=True)
    return tokenizer


def _chosen(row: Row, tokenizer: Any, labels: Labels | None, max_length: int | None) -> Item:
    first, seconds = choices_in(row)
    made = [encoded(tokenizer, first, text, max_length=max_length, cut="longest_first") for text in seconds]
    inputs = [inputs_in(encoding) for encoding, _ in made]
    joined = {name: [each[name] for each in inputs] for name in inputs[0]}
    return joined | {"labels": _answer(row, seconds)}, any(cut for _, cut in made)


def choices_in(row: Row) -> tuple[str, list[str]]:
    """What comes before the choices of a row, and the choices, each with what stands directly before it."""
    values = row.values
    key = next((key for key in _CHOICES if key in values), None)
    numbered = sorted((int(found[1]), name) for name in values if (found := _ENDING.fullmatch(name)))
    if key is None and len(numbered) < 2:
        raise _no_form(row, "`question`, `choices`, `label`, or `sent1`, `sent2`, `ending0`, …, `label`")
    choices = cells(row, key) if key else [values[name] for _, name in numbered]
    if len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise UsageError("the choices are not two texts or more", row.where, "make `choices` a list of strings")
    if "sent1" in values:
        start = text_in(row, "sent2") if "sent2" in values else ""
        return text_in(row, "sent1"), [f"{start} {choice}".strip() for choice in choices]
    asked = next((name for name in ("question", "prompt", "premise", "ctx", "sentence") if name in values), None)
    if asked is None:
        raise _no_form(row, "`question` or `prompt` beside the choices")
    if "context" in values and asked != "context":
        return text_in(row, "context"), [f"{text_in(row, asked)} {choice}" for choice in choices]
    if asked == "question" and "premise" in values:
        return f"{text_in(row, 'premise')} {text_in(row, 'question')}", choices
    return text_in(row, asked), choices


def _answer(row: Row, choices: list[str]) -> int:
    """The right choice: its number from 0, its letter, or its text."""
    given = next((row.values[key] for key in _ANSWER if key in row.values), None)
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    text = str(given)
    own = next((cells(row, key) for key in _CHOICES if key in row.values), choices)
    if text.isdecimal() and int(text) < len(choices):
        return int(text)
    if text in own:
        return own.index(text)
    if len(text) == 1 and 0 <= ord(text) - ord("A") < len(choices):
        return ord(text) - ord("A")
    what = "this row has no `label`" if given is None else f"the label {given!r} is none of {len(choices)} choices"
    raise UsageError(what, row.where, "the number of the right choice, from 0, or its text")


def _check_choices(rows: Sequence[Row], made: Sequence[Item]) -> None:
    first = made[0][0]["input_ids"]
    if not isinstance(first[0], list):
        return
    for row, (item, _) in zip(rows, made, strict=True):
        if len(item["input_ids"]) != len(first):
            what = f"this row has {len(item['input_ids'])} choices, the first one {len(first)}"
            raise UsageError(what, row.where, "give every row as many choices")


def _paired(row: Row, tokenizer: Any, labels: Labels | None, max_length: int | None) -> Item:
    keys = next((keys for keys in PAIRS if all(key in row.values for key in keys)), None)
    if keys is None:
        raise _no_form(row, "`source`, `target`, or `prompt`, `completion`")
    source, target = (text_in(row, key) for key in keys)
    if not target:
        raise UsageError(f"`{keys[1]}` is empty", row.where, "leave the row out, or say what is to be made of it")
    if row.values.get("input"):
        source = f"{source}\n{text_in(row, 'input')}"
    read, cut = encoded(tokenizer, source, max_length=max_length)
    written, also = encoded(tokenizer, max_length=max_length, text_target=target)
    return {"input_ids": list(read["input_ids"]), "labels": list(written["input_ids"])}, cut or also


def _no_form(row: Row, accepted: str) -> UsageError:
    seen = ", ".join(f"`{key}`" for key in row.values) or "none"
    return UsageError(f"the keys of this row do not fit the model's task: {seen}", row.where, f"give {accepted}")


_RENDERERS: Mapping[str, Callable[[Row, Any, Labels | None, int | None], Item]] = {
    "sequence-classification": _classified,
    "token-classification": _tagged,
    "multiple-choice": _chosen,
    "seq2seq-lm": _paired,
}
