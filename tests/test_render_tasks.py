"""Rows of classifiers, tags, choices and pairs as samples; bad rows name their line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig

from benchmarks.zoo.encoder import save_encoder
from surgeon.data import Row, load_rows
from surgeon.errors import UsageError
from surgeon.examples import ExampleCollator, Examples
from surgeon.render_tasks import render_examples
from surgeon.shown import shown

SEQUENCE, TOKEN, CHOICE = "sequence-classification", "token-classification", "multiple-choice"
NAMED = BertConfig(id2label={0: "neg", 1: "pos"})
TAGS = BertConfig(id2label={0: "B-LOC", 1: "B-PER", 2: "O"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_encoder(tmp_path_factory.mktemp("encoder")))


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, Path("d.jsonl"), number) for number, value in enumerate(values, 1)]


def rendered(tokenizer: Any, task: str, *values: dict[str, Any], config: Any = NAMED, length: int = 64) -> Examples:
    return render_examples(rows(*values), tokenizer, task, config, length)


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({"text": "the film was bad"}, "[CLS] the film was bad [SEP]"),
        ({"text_a": "the sun", "text_b": "is big"}, "[CLS] the sun [SEP] is big [SEP]"),
        ({"sentence1": "the sun", "sentence2": "is big"}, "[CLS] the sun [SEP] is big [SEP]"),
        ({"premise": "the sun", "hypothesis": "is big"}, "[CLS] the sun [SEP] is big [SEP]"),
    ],
)
def test_texts_and_pairs(tokenizer: Any, values: dict[str, str], read: str) -> None:
    data = rendered(tokenizer, SEQUENCE, values | {"label": "pos"}, values | {"label": 0})
    assert text(tokenizer, data[0]["input_ids"]) == read
    assert [item["labels"] for item in data.items] == [1, 0]
    assert data[0]["token_type_ids"].count(1) == ("[SEP] is" in read) * 3
    assert "2 classes: neg, pos" in data.summary()


def test_a_regression_takes_numbers(tokenizer: Any) -> None:
    config = BertConfig(num_labels=1)
    data = rendered(tokenizer, SEQUENCE, {"text": "a", "label": "0.5"}, {"text": "b", "label": 2}, config=config)
    assert [item["labels"] for item in data.items] == [0.5, 2.0]
    assert ExampleCollator.of(tokenizer)(data.items)["labels"].dtype == torch.float32
    with pytest.raises(UsageError, match="'much' is no number"):
        rendered(tokenizer, SEQUENCE, {"text": "a", "label": "much"}, config=config)


def test_labels_of_words_stand_on_their_first_piece(tokenizer: Any) -> None:
    values = {"tokens": ["john", "lives", "in", "london1", "."], "labels": ["B-PER", "O", 2, "B-LOC", -100]}
    item = rendered(tokenizer, TOKEN, values, config=TAGS)[0]
    pieces = tokenizer.convert_ids_to_tokens(item["input_ids"])
    assert pieces == ["[CLS]", "john", "lives", "in", "london", "##1", ".", "[SEP]"]
    assert item["labels"] == [-100, 1, 2, 2, 0, -100, -100, -100]


def test_long_samples_are_cut_and_counted(tokenizer: Any) -> None:
    data = rendered(tokenizer, SEQUENCE, *({"text": word * 30, "label": 0} for word in ("a ", "a")), length=16)
    assert data.truncated == 1
    assert len(data[0]["input_ids"]) == 16
    assert "1 cut to the maximum length" in data.summary()
    tags = rendered(tokenizer, TOKEN, {"tokens": ["a"] * 30, "labels": ["O"] * 30}, config=TAGS, length=16)
    assert len(tags[0]["labels"]) == len(tags[0]["input_ids"]) == 16


@pytest.mark.parametrize(
    ("values", "read"),
    [
        ({"question": "what is big ?", "choices": ["the ant", "the sun"]}, ("what is big?", "the sun")),
        ({"prompt": "what is big ?", "choices": '["the ant", "the sun"]'}, ("what is big?", "the sun")),
        (
            {"sent1": "john was born .", "sent2": "the", "ending0": "ant", "ending1": "sun"},
            ("john was born.", "the sun"),
        ),
        ({"context": "a film", "question": "who", "choices": ["the ant", "sun"]}, ("a film", "who sun")),
        ({"premise": "a film", "question": "what", "choice1": "ant", "choice2": "sun"}, ("a film what", "sun")),
    ],
)
def test_forms_of_choices(tokenizer: Any, values: dict[str, Any], read: tuple[str, str]) -> None:
    item = rendered(tokenizer, CHOICE, values | {"label": 1})[0]
    assert len(item["input_ids"]) == 2
    assert text(tokenizer, item["input_ids"][1]) == f"[CLS] {read[0]} [SEP] {read[1]} [SEP]"
    assert item["labels"] == 1


@pytest.mark.parametrize("label", [1, "1", 1.0, "B", "the sun"])
def test_the_right_choice_by_number_letter_or_text(tokenizer: Any, label: Any) -> None:
    values = {"question": "what", "choices": ["the ant", "the sun"], "label": label}
    assert rendered(tokenizer, CHOICE, values)[0]["labels"] == 1


def test_choices_are_batched_with_an_axis_of_their_own(tokenizer: Any) -> None:
    short = {"question": "a", "choices": ["a", "the sun is big"], "label": 0}
    batch = ExampleCollator.of(tokenizer)(rendered(tokenizer, CHOICE, short, short).items)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 2, 8)
    assert batch["attention_mask"].sum(-1).tolist() == [[5, 8], [5, 8]]
    assert batch["labels"].tolist() == [0, 0]


@pytest.mark.parametrize("keys", [("source", "target"), ("prompt", "completion")])
def test_pairs_keep_what_is_read_apart_from_what_is_written(tokenizer: Any, keys: tuple[str, str]) -> None:
    data = rendered(tokenizer, "seq2seq-lm", {keys[0]: "the sun is big", keys[1]: "the ant"})
    assert text(tokenizer, data[0]["input_ids"]) == "[CLS] the sun is big [SEP]"
    assert text(tokenizer, data[0]["labels"]) == "[CLS] the ant [SEP]"
    batch = ExampleCollator.of(tokenizer)([data[0], {"input_ids": [5], "labels": [5]}])
    assert batch["labels"].tolist()[1] == [5, -100, -100, -100]
    assert batch["attention_mask"].sum(1).tolist() == [6, 1]


@pytest.mark.parametrize(
    ("task", "values", "what"),
    [
        (SEQUENCE, {"text": "a"}, "no label"),
        (SEQUENCE, {"text": "a", "label": "posi"}, "unknown label 'posi'"),
        (SEQUENCE, {"text": 5, "label": "pos"}, "`text` is not a string, but a int"),
        (SEQUENCE, {"body": "a", "label": "pos"}, "do not fit the model's task: `body`, `label`"),
        (TOKEN, {"tokens": ["a", "b"], "labels": ["O"]}, "2 tokens and 1 labels"),
        (TOKEN, {"tokens": [], "labels": []}, "0 tokens and 0 labels"),
        (TOKEN, {"tokens": ["a", 1], "labels": ["O", "O"]}, "no string"),
        (TOKEN, {"tokens": "a b", "labels": ["O"]}, "`tokens` is not a list"),
        (TOKEN, {"tokens": '["a"', "labels": ["O"]}, "`tokens` is not a JSON list"),
        (TOKEN, {"tokens": ["a"], "labels": ["B-ORG"]}, "unknown label 'B-ORG'"),
        (CHOICE, {"question": "a", "choices": ["b"], "label": 0}, "two texts or more"),
        (CHOICE, {"question": "a", "choices": ["b", "c"], "label": 2}, "the label 2 is none of 2 choices"),
        (CHOICE, {"question": "a", "choices": ["b", "c"]}, "no `label`"),
        (CHOICE, {"choices": ["b", "c"], "label": 0}, "do not fit the model's task"),
        (CHOICE, {"question": "a", "label": 0}, "do not fit the model's task"),
        ("seq2seq-lm", {"source": "a", "target": ""}, "`target` is empty"),
        ("seq2seq-lm", {"text": "a"}, "do not fit the model's task"),
    ],
)
def test_bad_rows_name_file_and_line(tokenizer: Any, task: str, values: dict[str, Any], what: str) -> None:
    config = TAGS if task == TOKEN else NAMED
    with pytest.raises(UsageError) as caught:
        rendered(tokenizer, task, values, config=config)
    assert what in caught.value.what
    assert caught.value.where == "d.jsonl:1"
    assert caught.value.hint


def test_other_bad_data(tokenizer: Any) -> None:
    other = {"question": "a", "choices": ["b", "c", "d"], "label": 0}
    with pytest.raises(UsageError, match="3 choices, the first one 2") as caught:
        rendered(tokenizer, CHOICE, {"question": "a", "choices": ["b", "c"], "label": 0}, other)
    assert caught.value.where == "d.jsonl:2"
    with pytest.raises(UsageError, match="empty"):
        rendered(tokenizer, SEQUENCE)
    with pytest.raises(UsageError, match="leaves no text"):
        rendered(tokenizer, SEQUENCE, {"text": "a", "label": 0}, length=3)
    with pytest.raises(UsageError, match="several labels"):
        rendered(tokenizer, SEQUENCE, {"text": "a"}, config=BertConfig(problem_type="multi_label_classification"))
    with pytest.raises(UsageError, match="does not train"):
        rendered(tokenizer, "features", {"text": "a"})


def test_files_of_every_kind_give_the_same_samples(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text('tokens,labels\n"[""john"", "".""]","[""B-PER"", ""O""]"\n')
    (tmp_path / "d.jsonl").write_text(json.dumps({"tokens": ["john", "."], "labels": ["B-PER", "O"]}) + "\n")
    found = [render_examples(load_rows(tmp_path / name), tokenizer, TOKEN, TAGS) for name in ("d.csv", "d.jsonl")]
    assert found[0].digest == found[1].digest


def test_what_is_shown_before_training(tokenizer: Any) -> None:
    tags = {"tokens": ["john", "."], "labels": ["B-PER", "O"]}
    assert "john/B-PER ./O" in shown(rendered(tokenizer, TOKEN, tags, config=TAGS), tokenizer).plain
    choices = rendered(tokenizer, CHOICE, {"question": "what", "choices": ["ant", "sun"], "label": 1})
    assert [line[:2] for line in shown(choices, tokenizer).plain.splitlines()] == ["0:", "1:"]
    assert shown(rendered(tokenizer, SEQUENCE, {"text": "a", "label": 1}), tokenizer).plain.endswith("→ pos")
    pairs = rendered(tokenizer, "seq2seq-lm", {"source": "the sun", "target": "the ant"})
    assert " → [CLS] the ant" in shown(pairs, tokenizer).plain
