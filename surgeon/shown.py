"""One sample of a task as text for a terminal, as the model reads it: what is right in bold green, the rest dim."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from surgeon.examples import Examples
from surgeon.loss import IGNORE
from surgeon.render import Rendered, shown_sample
from surgeon.samples import Data

READ, RIGHT = "dim", "bold green"


def shown(data: Data, tokenizer: Any, number: int = 0, *, max_tokens: int = 400) -> Text:
    """A sample of any data."""
    if isinstance(data, Rendered):
        return shown_sample(data.samples[number], tokenizer, max_tokens=max_tokens)
    return _SHOWN[data.task](data, tokenizer, number, max_tokens)


def _classified(data: Examples, tokenizer: Any, number: int, most: int) -> Text:
    item = data[number]
    assert data.labels is not None
    label = item["labels"] if data.labels.regression else data.labels.names[item["labels"]]
    return _read(tokenizer, item["input_ids"], most).append(" → ").append(str(label), style=RIGHT)


def _tagged(data: Examples, tokenizer: Any, number: int, most: int) -> Text:
    item, text = data[number], Text()
    assert data.labels is not None
    for token, label in list(zip(item["input_ids"], item["labels"], strict=True))[:most]:
        text.append(" " + tokenizer.decode([token]), style=READ)
        if label != IGNORE:
            text.append("/" + data.labels.names[label], style=RIGHT)
    return text


def _asked(data: Examples, tokenizer: Any, number: int, most: int) -> Text:
    ids, first, last = (data[number][name] for name in ("input_ids", "start_positions", "end_positions"))
    if first == last == data.questions[0].none_at[0]:
        return _read(tokenizer, ids, most).append(" → ").append("no answer in this window", style=RIGHT)
    text = _read(tokenizer, ids[:first], most)
    text.append(" " + tokenizer.decode(ids[first : last + 1]) + " ", style=RIGHT)
    return text.append(_read(tokenizer, ids[last + 1 :], most))


def _chosen(data: Examples, tokenizer: Any, number: int, most: int) -> Text:
    item, text = data[number], Text()
    for choice, ids in enumerate(item["input_ids"]):
        right = choice == item["labels"]
        text.append("\n" if choice else "").append(f"{choice}: ", style=RIGHT if right else READ)
        text.append(_read(tokenizer, ids, most, RIGHT if right else READ))
    return text


def _paired(data: Examples, tokenizer: Any, number: int, most: int) -> Text:
    item = data[number]
    return _read(tokenizer, item["input_ids"], most).append(" → ").append(_read(tokenizer, item["labels"], most, RIGHT))


def _read(tokenizer: Any, ids: list[int], most: int, style: str = READ) -> Text:
    rest = f" … {len(ids) - most} more tokens" if len(ids) > most else ""
    return Text(tokenizer.decode(ids[:most]), style=style).append(rest, style="italic")


_SHOWN = {
    "sequence-classification": _classified,
    "token-classification": _tagged,
    "question-answering": _asked,
    "multiple-choice": _chosen,
    "seq2seq-lm": _paired,
}
