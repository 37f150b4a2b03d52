"""Rows with questions about a context (SQuAD, SQuAD 2) to windows of tokens, and spans of tokens back to answers.

A row is flat (`question`, `context`, `answers: {text: […], answer_start: […]}`, or `answer`, `answer_start`) or the
nested file of SQuAD itself (`data`, `paragraphs`, `qas`). No answer, or `is_impossible`, is a question without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgeon.data import Row, text_in
from surgeon.errors import UsageError
from surgeon.examples import Examples, Question

WINDOW, STRIDE = 384, 128
"""Tokens of a window and how many of them the next one repeats (Devlin et al. 2019, their SQuAD code)."""
LONGEST_ANSWER = 30
Span = tuple[int, int]


def render_questions(rows: Sequence[Row], tokenizer: Any, max_length: int | None = None) -> Examples:
    """The windows of all questions. Raises UsageError for a row that lacks something or whose answer is not there."""
    if not tokenizer.is_fast:
        what = "the tokenizer cannot say where in the text a token stands"
        raise UsageError(what, type(tokenizer).__name__, "use a checkpoint with a tokenizer.json")
    width = min(max_length or WINDOW, WINDOW)
    items: list[Mapping[str, Any]] = []
    questions: list[Question] = []
    for row in (flat for given in rows for flat in _flat(given)):
        made, question = _windows(row, tokenizer, width, len(items))
        items += made
        questions.append(question)
    if not questions:
        raise UsageError("the data has no question", str(rows[0].file), "give `question`, `context`, `answers`")
    return Examples("question-answering", tuple(items), questions=tuple(questions))


def _flat(row: Row) -> Iterator[Row]:
    """The questions of a row: itself, or all that SQuAD's own nesting holds."""
    whole = row.values
    if not any(isinstance(whole.get(key), list) for key in ("data", "paragraphs", "qas")):
        yield row
        return
    try:
        articles = whole.get("data", [whole])
        for article in articles:
            for paragraph in article.get("paragraphs", [article]):
                for asked in paragraph["qas"]:
                    yield Row({"context": paragraph["context"], **asked}, row.file, row.line)
    except (TypeError, KeyError) as error:
        raise UsageError(f"not SQuAD's nesting: no {error}", row.where, "data → paragraphs → qas, or flat") from error


def answers_in(row: Row) -> list[tuple[str, int]]:
    """The right answers of a row with their places in the context, checked to stand there."""
    given = row.values.get("answers", row.values.get("answer", row.values.get("answer_text")))
    if row.values.get("is_impossible") in (True, "true", "True") or given in (None, "", [], {}):
        return []
    if isinstance(given, dict):
        texts, starts = given.get("text", []), given.get("answer_start", [])
    elif isinstance(given, list):
        each = [one for one in given if isinstance(one, dict)]
        texts, starts = [one.get("text") for one in each], [one.get("answer_start") for one in each]
    else:
        texts, starts = [given], [row.values.get("answer_start")]
    context = text_in(row, "context")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise UsageError("the answers have other numbers of texts and starts", row.where, "one start per text")
    found = [(text, _start(start, row)) for text, start in zip(texts, starts, strict=True)]
    for text, start in found:
        if not isinstance(text, str) or not text or context[start : start + len(text)] != text:
            there = context[start : start + len(str(text))]
            what = f"the answer {text!r} does not stand at {start} in the context, but {there!r}"
            raise UsageError(what, row.where, "answer_start counts characters of the context from 0")
    return found


def _start(value: Any, row: Row) -> int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"answer_start is {value!r}", row.where, "it counts characters of the context from 0")
    return value


def _windows(row: Row, tokenizer: Any, width: int, position: int) -> tuple[list[Mapping[str, Any]], Question]:
    question, context, answers = text_in(row, "question").strip(), text_in(row, "context"), answers_in(row)
    room = width - len(tokenizer(question, "")["input_ids"])
    if room < 8:
        what = f"the question leaves {max(room, 0)} of {width} tokens for its context"
        raise UsageError(what, row.where, "shorten the question, or raise the maximum length")
    encoding = tokenizer(
        question, context, truncation="only_second", max_length=width, stride=min(STRIDE, room // 2),
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    items: list[Mapping[str, Any]] = []
    offsets, none_at = [], []
    for number, ids in enumerate(encoding["input_ids"]):
        inside = [part == 1 for part in encoding.sequence_ids(number)]
        places = zip(inside, encoding["offset_mapping"][number], strict=True)
        own = tuple((int(place[0]), int(place[1])) if here else None for here, place in places)
        start = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        first, last = _tokens_of(answers[0], own) if answers else (None, None)
        item = {"input_ids": list(ids), "start_positions": first or start, "end_positions": last or start}
        if "token_type_ids" in encoding:
            item["token_type_ids"] = list(encoding["token_type_ids"][number])
        items.append(item)
        offsets.append(own)
        none_at.append(start)
    windows = tuple(range(position, position + len(items)))
    texts = tuple(text for text, _ in answers)
    return items, Question(context, texts, windows, tuple(offsets), tuple(none_at))


def _tokens_of(answer: tuple[str, int], offsets: Sequence[Span | None]) -> tuple[int | None, int | None]:
    """First and last token of an answer, if all of it stands in this window."""
    begin, end = answer[1], answer[1] + len(answer[0])
    here = [(at, place) for at, place in enumerate(offsets) if place is not None and place[1] > place[0]]
    if not here or here[0][1][0] > begin or here[-1][1][1] < end:
        return None, None
    tokens = [at for at, (start, stop) in here if start < end and stop > begin]
    return (tokens[0], tokens[-1]) if tokens else (None, None)


def best_answer(question: Question, starts: Sequence[Tensor], ends: Sequence[Tensor], *, none: bool) -> str:
    """The most likely span of all windows, as a text; "" if `none` allows it and no answer is likelier.

    The score of a span is start logit + end logit; that of no answer the lowest over the windows (Devlin et al. 2019).
    `starts` and `ends` are `[t]` per window.
    """
    best, text, empty = -float("inf"), "", float("inf")
    for start, end, places, at in zip(starts, ends, question.offsets, question.none_at, strict=True):
        count = len(places)
        inside = torch.tensor([place is not None for place in places])
        allowed = torch.ones(count, count, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
        scores = start[:count, None].float() + end[None, :count].float()
        scores = scores.masked_fill(~(allowed & inside[:, None] & inside[None, :]), -float("inf"))
        empty = min(empty, float(start[at] + end[at]))
        flat = int(scores.argmax())
        first, last = places[flat // count], places[flat % count]
        if first is not None and last is not None and scores.flatten()[flat] > best:
            best, text = float(scores.flatten()[flat]), question.context[first[0] : last[1]]
    return "" if none and empty > best else text
