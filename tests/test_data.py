"""Data files, row forms, loss masks and batches; every kind of bad data is an error that names its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from rich.text import Text
from transformers import AutoTokenizer

from surgeon.data import Collator, Row, form_of, load_rows
from surgeon.errors import UsageError
from surgeon.render import Rendered, Sample, load_data, plain_sample, render, render_rows, shown_sample

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
# As in Qwen 3: reasoning is shown only in the last answer.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UNCLOSED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TALK = [
    {"role": "user", "content": "first question"},
    {"role": "assistant", "content": "one answer"},
    {"role": "user", "content": "second question"},
    {"role": "assistant", "content": "another answer"},
]


@pytest.fixture
def tokenizer(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "models" / "pystdlib-llama")


def row(**values: Any) -> Row:
    return Row(values, Path("data.jsonl"), 7)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def trained(sample: Sample, tokenizer: Any) -> str:
    return tokenizer.decode([i for i in sample.labels if i != -100])


# ---- files


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    rows = [{"prompt": 'a, "b"\n', "completion": "c\td"}, {"prompt": "é", "completion": "ü"}]
    path = tmp_path / f"data.{ending}"
    if ending == "jsonl":
        write(path, "\n".join(map(json.dumps, rows)) + "\n\n")
    elif ending == "json":
        write(path, json.dumps(rows, indent=1))
    elif ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        comma = {"csv": ",", "tsv": "\t"}[ending]
        cells = [["prompt", "completion"], *([r["prompt"], r["completion"]] for r in rows)]
        write(path, "\r\n".join(comma.join('"' + c.replace('"', '""') + '"' for c in line) for line in cells))
    loaded = load_rows(path)
    assert [dict(r.values) for r in loaded] == rows
    assert {form_of(r) for r in loaded} == {"completion"}


def test_json_lines_under_a_json_name(tmp_path: Path) -> None:
    loaded = load_rows(write(tmp_path / "d.json", '{"text": "a"}\n{"text": "b"}\n'))
    assert [(r.values["text"], r.line) for r in loaded] == [("a", 1), ("b", 2)]


def test_byte_order_mark_and_null_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '\ufeff{"text": "a", "messages": null}\n')
    assert [dict(r.values) for r in load_rows(path)] == [{"text": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "place", "what"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text": \n', "d.jsonl:2", "not a line of JSON"),
        ("d.jsonl", '{"text": "a"}\n\n[1, 2]\n', "d.jsonl:3", "not an object with keys, but a list"),
        ("d.json", '[{"text": "a"},\n {"text": }]', "d.json:2", "not JSON"),
        ("d.json", '[{"text": "a"}, 5]', "d.json:2", "not an object with keys, but a int"),
        ("d.csv", "text,extra\na,b\nc\n", "d.csv:3", "this row has 1 fields, the header has 2"),
        ("d.csv", 'text\n"a\n', "d.csv:2", "cannot be read"),
        ("d.parquet", "PAR1 and then nothing", "d.parquet", "not a Parquet file"),
        ("d.jsonl", "", "d.jsonl", "the data is empty"),
        ("d.jsonl", "\n\n", "d.jsonl", "the data is empty"),
        ("d.json", "[]", "d.json", "the data is empty"),
        ("d.json", "", "d.json", "the data is empty"),
        ("d.csv", "text\n", "d.csv", "the data is empty"),
        ("d.csv", "", "d.csv", "the data is empty"),
        ("d.txt", "a", "d.txt", "unknown kind of data file `.txt`"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path: Path, name: str, content: str, place: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_rows(write(tmp_path / name, content))
    assert caught.value.what.startswith(what) or what in caught.value.what
    assert caught.value.where == str(tmp_path / place)
    assert len(str(caught.value).splitlines()) == 3
    assert caught.value.exit_code == 2


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UsageError, match="utf-8") as caught:
        load_rows(path)
    assert caught.value.where.endswith("d.jsonl:2")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such data file"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="is a folder"):
        load_rows(tmp_path)


# ---- forms


def test_forms_by_keys() -> None:
    assert form_of(row(messages=[])) == "chat"
    assert form_of(row(instruction="a", output="b", text="all of it")) == "alpaca"
    assert form_of(row(prompt="a", completion="b")) == "completion"
    assert form_of(row(text="a", path="p")) == "text"


def test_unknown_keys_list_what_was_seen_and_what_is_accepted() -> None:
    with pytest.raises(UsageError) as caught:
        form_of(row(question="a", answer="b"))
    assert "`question`, `answer`" in caught.value.what
    assert caught.value.where == "data.jsonl:7"
    for key in ("messages", "instruction", "prompt", "completion", "text"):
        assert f"`{key}`" in caught.value.hint


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"text": 5}, "`text` is not a string, but a int"),
        ({"prompt": ["a"], "completion": "b"}, "`prompt` is not a string, but a list"),
        ({"messages": "hello"}, "`messages` is not a list with messages"),
        ({"messages": []}, "`messages` is not a list with messages"),
        ({"messages": [{"content": "hello"}]}, "message 1 has no `role`"),
        ({"messages": [TALK[0], {"role": "assistant"}]}, "message 2 has no `role`, or neither"),
        ({"messages": TALK, "tools": "{"}, "`tools` is not JSON"),
    ],
)
def test_malformed_rows_name_file_and_line(tokenizer: Any, values: dict[str, Any], what: str) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(UsageError) as caught:
        render(row(**values), tokenizer)
    assert caught.value.what.startswith(what)
    assert caught.value.where == "data.jsonl:7"


# ---- loss masks


def test_text_trains_on_everything_and_ends(tokenizer: Any) -> None:
    sample = render(row(text="import os"), tokenizer)
    assert sample.labels == sample.input_ids
    assert sample.input_ids[-1] == tokenizer.eos_token_id
    assert render(row(text="import os</s>"), tokenizer) == sample, "one end token, not two"


def test_completion_trains_on_the_completion(tokenizer: Any) -> None:
    sample = render(row(prompt="def f(", completion="x): return x"), tokenizer)
    assert trained(sample, tokenizer) == "x): return x</s>"
    before = tokenizer("def f(")["input_ids"]
    assert sample.input_ids[: len(before)] == before
    assert set(sample.labels[: len(before)]) == {-100}


def test_a_token_across_the_border_is_split_there(tokenizer: Any) -> None:
    sample = render(row(prompt="impor", completion="t os"), tokenizer)
    assert sample.input_ids[: len(tokenizer("impor")["input_ids"])] == tokenizer("impor")["input_ids"]
    assert trained(sample, tokenizer) == "t os</s>"


def test_alpaca(tokenizer: Any) -> None:
    sample = render(row(instruction="Add.", input="1 2", output="3"), tokenizer)
    text = tokenizer.decode(sample.input_ids)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>" in text
    assert trained(sample, tokenizer) == "3</s>"
    assert "Input" not in tokenizer.decode(render(row(instruction="Add.", output="3"), tokenizer).input_ids)


def test_start_token_once(tokenizer: Any) -> None:
    tokenizer.add_bos_token = True
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("a")["input_ids"][0] == 1
    for values in ({"text": "a b"}, {"text": "<s>a b"}, {"prompt": "<s>a", "completion": " b"}):
        ids = render(row(**values), tokenizer).input_ids
        assert ids.count(1) == 1
        assert ids[0] == 1
    tokenizer.chat_template = "<s>" + CHATML
    assert render(row(messages=TALK), tokenizer).input_ids.count(1) == 1


@pytest.mark.parametrize("template", [CHATML, MARKED, FORGETFUL], ids=["prefixes", "marks", "forgetful"])
def test_chat_trains_on_assistant_turns(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    sample = render(row(messages=TALK), tokenizer)
    assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    said = trained(sample, tokenizer).replace("\n", "").replace("<think></think>", "")
    assert said == "one answer</s>another answer</s>"


def test_chat_without_end_of_turn_gets_an_end(tokenizer: Any) -> None:
    tokenizer.chat_template = UNCLOSED
    sample = render(row(messages=TALK[:2]), tokenizer)
    assert sample.input_ids[-1] == sample.labels[-1] == tokenizer.eos_token_id
    assert render(row(messages=TALK[:3]), tokenizer).input_ids[-1] != tokenizer.eos_token_id


def test_tool_calls_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
    messages = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    tools = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
    sample = render(row(messages=messages, tools=json.dumps(tools)), tokenizer)
    assert '"parameters"' in tokenizer.decode(sample.input_ids)
    assert '"name": "sum"' in trained(sample, tokenizer)
    assert "<|tool|>" not in trained(sample, tokenizer)


def test_chat_without_a_template(tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        render(row(messages=TALK), tokenizer)


def test_template_that_refuses_or_is_inconsistent(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match="roles must alternate"):
        render(row(messages=TALK), tokenizer)
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UsageError, match=r"renders message 2 differently"):
        render(row(messages=TALK), tokenizer)


# ---- data sets


def test_truncation_and_drops_are_counted(tokenizer: Any) -> None:
    rows = [
        row(prompt="a " * 50, completion="b"),
        row(prompt="a", completion="b " * 50),
        row(prompt="a", completion=""),
    ]
    data = render_rows([*rows, row(text="x y")], tokenizer, max_length=16)
    assert (len(data), data.truncated, data.dropped) == (2, 2, 2)
    assert max(len(s.input_ids) for s in data.samples) == 16
    assert "2 cut to the maximum length; 2 dropped" in data.summary()
    with pytest.raises(UsageError, match="no row has a token to train on"):
        render_rows(rows[:1], tokenizer, max_length=16)
    with pytest.raises(UsageError, match="leaves nothing to predict"):
        render_rows(rows, tokenizer, max_length=1)


def test_real_data(shared: Path, tokenizer: Any, tmp_path: Path) -> None:
    lines = (shared / "data" / "c_headers.heldout.jsonl").read_text().splitlines()[:20]
    data = load_data(write(tmp_path / "d.jsonl", "\n".join(lines)), tokenizer, max_length=128)
    assert len(data) == 20
    assert data.digest == load_data(tmp_path / "d.jsonl", tokenizer, max_length=128).digest
    assert data.digest != load_data(tmp_path / "d.jsonl", tokenizer, max_length=127).digest


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator(side: str) -> None:
    data = Rendered((Sample([5, 6, 7], [-100, 6, 7]), Sample([8], [8])))
    batch = Collator(0, side, position_ids=True, multiple_of=4)([data[0], data[1]])
    order = slice(None, None, 1 if side == "right" else -1)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0][order], [1, 0, 0, 0][order]]
    assert batch["labels"][1].tolist() == [8, -100, -100, -100][order]
    assert batch["input_ids"].tolist() == (
        [[5, 6, 7, 0], [8, 0, 0, 0]] if side == "right" else [[0, 5, 6, 7], [0, 0, 0, 8]]
    )
    assert batch["position_ids"][0].tolist() == ([0, 1, 2, 2] if side == "right" else [0, 0, 1, 2])


def test_collator_of_a_tokenizer(tokenizer: Any) -> None:
    assert Collator.of(tokenizer).pad_id == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert Collator.of(tokenizer).pad_id == tokenizer.eos_token_id
    with pytest.raises(UsageError, match="padding side `up`"):
        Collator(0, "up")


def test_shown_sample_marks_what_is_trained(tokenizer: Any) -> None:
    sample = render(row(prompt="def f(", completion="x): return x"), tokenizer)
    assert plain_sample(sample, tokenizer) == "def f(⟦x): return x</s>⟧"
    text = shown_sample(sample, tokenizer)
    assert isinstance(text, Text)
    assert text.plain == "def f(x): return x</s>"
    assert [str(span.style) for span in text.spans] == ["dim", "bold green"]
    assert plain_sample(sample, tokenizer, max_tokens=2).endswith(f"… {len(sample.input_ids) - 2} more tokens")
