"""Questions: windows with offsets, answers found again, flat and nested rows, questions without an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.zoo.encoder import save_encoder
from surgeon.data import Row, load_rows
from surgeon.errors import UsageError
from surgeon.examples import Examples
from surgeon.render_squad import answers_in, best_answer, render_questions
from surgeon.shown import shown

LONG = "the sun is big . " * 20 + "the Tower in Paris is 33 long . " + "the ant is small . " * 20
ANSWER = "Paris is 33"
ROW: dict[str, Any] = {
    "question": "how tall is the tower ?",
    "context": LONG,
    "answers": {"text": [ANSWER, "33"], "answer_start": [LONG.index(ANSWER), LONG.index("33")]},
}
NO_ANSWER = {"question": "who built the tower ?", "context": "the sun .", "answers": {"text": [], "answer_start": []}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_encoder(tmp_path_factory.mktemp("encoder"), 512))


def row(values: dict[str, Any]) -> Row:
    return Row(values, Path("q.jsonl"), 4)


def rendered(tokenizer: Any, *values: dict[str, Any], length: int = 40) -> Examples:
    return render_questions([row(value) for value in values], tokenizer, length)


def perfect(data: Examples) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of a model that is always right."""
    count = max(map(data.length, range(len(data))))
    parts = [[item[name] for item in data.items] for name in ("start_positions", "end_positions")]
    starts, ends = ([torch.nn.functional.one_hot(torch.tensor(i), count) * 10.0 for i in part] for part in parts)
    return starts, ends


def test_long_contexts_are_cut_into_overlapping_windows(tokenizer: Any) -> None:
    data = rendered(tokenizer, ROW)
    (question,) = data.questions
    assert len(data) > 5
    assert question.windows == tuple(range(len(data)))
    assert max(map(data.length, range(len(data)))) == 40
    covered = [place for offsets in question.offsets for place in offsets if place is not None]
    assert set(range(len(LONG))) - {i for a, b in covered for i in range(a, b)} <= {
        i for i, letter in enumerate(LONG) if letter == " "
    }
    assert len(covered) > len(set(covered)), "windows overlap"
    for item, offsets in zip(data.items, question.offsets, strict=True):
        first, last = item["start_positions"], item["end_positions"]
        if first:
            (begin, _), (_, end) = offsets[first], offsets[last]  # type: ignore[misc]
            assert LONG[begin:end] == ANSWER
        else:
            assert (first, last) == (0, 0)
    assert any(item["start_positions"] for item in data.items)


@pytest.mark.parametrize("length", [30, 40, 512])
def test_right_logits_give_the_right_text(tokenizer: Any, length: int) -> None:
    data = rendered(tokenizer, ROW, NO_ANSWER, length=length)
    starts, ends = perfect(data)
    for question in data.questions:
        own = ([logits[w] for w in question.windows] for logits in (starts, ends))
        expected = question.answers[0] if question.answers else ""
        windows = [w for w in question.windows if data[w]["start_positions"]]
        if question.answers:
            starts_of, ends_of = ([part[w] for w in question.windows] for part in (starts, ends))
            assert best_answer(question, starts_of, ends_of, none=False) == expected
            assert windows
        else:
            assert best_answer(question, *own, none=True) == ""


def test_spans_are_in_order_inside_the_context_and_short(tokenizer: Any) -> None:
    data = rendered(tokenizer, {**ROW, "context": "the big sun", "answers": []}, length=64)
    question = data.questions[0]
    count = len(data[0]["input_ids"])
    words = [at for at, place in enumerate(question.offsets[0]) if place is not None]
    start, end = torch.zeros(count), torch.zeros(count)
    start[1], end[1] = 99, 99  # the question's own tokens are no answer
    start[words[2]], end[words[0]] = 5, 5  # an end before its start is none
    start[words[1]], end[words[2]] = 6, 3
    assert best_answer(question, [start], [end], none=False) == "big sun"


def test_nested_flat_and_listed_answers_are_the_same(tokenizer: Any, tmp_path: Path) -> None:
    start = LONG.index(ANSWER)
    listed = {**ROW, "answers": [{"text": ANSWER, "answer_start": start}]}
    flat = {"question": ROW["question"], "context": LONG, "answer": ANSWER, "answer_start": str(start)}
    asked = {"question": ROW["question"], "id": "1", "answers": listed["answers"], "is_impossible": False}
    nested = {"version": "2", "data": [{"title": "t", "paragraphs": [{"context": LONG, "qas": [asked, asked]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(nested))
    ours = rendered(tokenizer, listed)
    assert ours.items == rendered(tokenizer, flat).items
    whole = render_questions(load_rows(tmp_path / "squad.json"), tokenizer, 40)
    assert len(whole.questions) == 2
    assert whole.items[: len(ours)] == ours.items
    assert answers_in(row({**listed, "is_impossible": True})) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"context": None}, "there is no `context`"),
        ({"question": 3}, "`question` is not a string"),
        ({"answers": {"text": ["sun"], "answer_start": [0]}}, "does not stand at 0"),
        ({"answers": {"text": ["sun"], "answer_start": []}}, "other numbers of texts and starts"),
        ({"answers": {"text": ["sun"], "answer_start": [-1]}}, "answer_start is -1"),
        ({"answers": None, "answer": "sun"}, "answer_start is None"),
        ({"question": "the sun " * 30}, "the question leaves 0 of 40 tokens"),
        ({"qas": [{"question": "a"}]}, "no 'context'"),
    ],
)
def test_bad_rows_name_file_and_line(tokenizer: Any, change: dict[str, Any], what: str) -> None:
    values = {key: value for key, value in {**ROW, **change}.items() if value is not None}
    if "qas" in change:
        values = dict(change)
    with pytest.raises(UsageError) as caught:
        rendered(tokenizer, values)
    assert what in caught.value.what
    assert caught.value.where == "q.jsonl:4"


def test_what_is_shown_before_training(tokenizer: Any) -> None:
    data = rendered(tokenizer, ROW, NO_ANSWER)
    window = next(number for number, item in enumerate(data.items) if item["start_positions"])
    spans = [str(data_span) for data_span in shown(data, tokenizer, window).spans]
    assert any("bold green" in span for span in spans)
    assert "no answer in this window" in shown(data, tokenizer, len(data) - 1).plain
    assert "2 questions, 1 without an answer" in data.summary()
