"""Names of classes: from the data, from the config, and which id a label is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from surgeon.data import Row
from surgeon.errors import UsageError
from surgeon.labels import Labels, chosen, labels_of, names_in, parse_labels

SEQUENCE, TOKEN = "sequence-classification", "token-classification"


def rows(*labels: Any, key: str = "label") -> list[Row]:
    return [Row({"text": "t", key: label}, Path("d.csv"), n) for n, label in enumerate(labels, 2)]


def config(*names: str, **options: Any) -> BertConfig:
    return BertConfig(**({"id2label": dict(enumerate(names))} if names else {}), **options)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("pos", "neg", "pos"), ("neg", "pos")),
        ((10, 9, 1), ("1", "9", "10")),
        (("10", "9", "1"), ("1", "9", "10")),
        ((1.0, 0.0), ("0", "1")),
        (("b", 1), ("1", "b")),
    ],
)
def test_names_are_sorted(given: tuple[Any, ...], expected: tuple[str, ...]) -> None:
    assert names_in(rows(*given), SEQUENCE) == expected


def test_names_of_tokens_leave_out_what_does_not_count() -> None:
    found = names_in(rows(["O", "B-X"], '["I-X", "O"]', key="labels"), TOKEN)
    assert found == ("B-X", "I-X", "O")
    assert names_in(rows([0, -100, 2], key="ner_tags"), TOKEN) == ("0", "2")


def test_ids_by_name_and_by_number() -> None:
    named, counted, stars = Labels(("neg", "pos")), Labels(("LABEL_0", "LABEL_1")), Labels(("1", "2"))
    assert [named.id_of(value, "") for value in ("pos", 1, "0", 1.0)] == [1, 1, 0, 1]
    assert [counted.id_of(value, "") for value in (1, "LABEL_0")] == [1, 0]
    assert [stars.id_of(value, "") for value in (1, "2")] == [0, 1]
    for labels, value, what in ((named, "po", "pos"), (stars, 0, "1"), (counted, "pos", "ids 0 to 1")):
        with pytest.raises(UsageError, match="unknown label") as caught:
            labels.id_of(value, "d.csv:7")
        assert caught.value.where == "d.csv:7"
        assert what in caught.value.hint
    with pytest.raises(UsageError, match="neither a name nor a whole number"):
        named.id_of(0.5, "d.csv:7")


def test_an_open_head_takes_the_data_s_classes() -> None:
    assert chosen(rows("b", "a", "c"), config(), SEQUENCE, open_head=True) == ("a", "b", "c")
    assert chosen(rows("b", "a"), config("x", "y"), SEQUENCE, open_head=True) == ("a", "b")
    assert chosen(rows("b", "a"), config("b", "a", "c"), SEQUENCE, open_head=True) is None


def test_a_head_of_a_fixed_size_takes_names_alone() -> None:
    assert chosen(rows("b", "a"), config(), SEQUENCE, open_head=False) == ("a", "b")
    assert chosen(rows(0, 1, 0), config(), SEQUENCE, open_head=False) is None
    assert chosen(rows("b", "a"), config("a", "b"), SEQUENCE, open_head=False) is None
    assert chosen(rows(0.5, 1.5), config(num_labels=1), SEQUENCE, open_head=False) is None
    with pytest.raises(UsageError, match=r"the data has 3 classes .* head 2") as caught:
        chosen(rows("a", "b", "c"), config(), SEQUENCE, open_head=False)
    assert "--labels a,b,c" in caught.value.hint
    with pytest.raises(UsageError, match="all labels of the data are the same"):
        chosen(rows("a", "a"), config(), SEQUENCE, open_head=True)


def test_a_row_without_a_label_names_its_line() -> None:
    with pytest.raises(UsageError, match="no label") as caught:
        chosen([*rows("a"), Row({"text": "t"}, Path("d.csv"), 9)], config(), SEQUENCE, open_head=True)
    assert caught.value.where == "d.csv:9"


def test_labels_of_a_config() -> None:
    assert not labels_of(config()).named
    assert labels_of(config("neg", "pos")).names == ("neg", "pos")
    assert labels_of(config(num_labels=1)).regression


def test_labels_on_a_command_line(tmp_path: Path) -> None:
    assert parse_labels("neg, pos", SEQUENCE) == ("neg", "pos")
    assert parse_labels("3", SEQUENCE) == ("LABEL_0", "LABEL_1", "LABEL_2")
    file = tmp_path / "d.csv"
    file.write_text("text,label\na,z\nb,y\n")
    assert parse_labels(str(file), SEQUENCE) == ("y", "z")
    for text in ("0", "a", "a,a", ","):
        with pytest.raises(UsageError, match="names no classes"):
            parse_labels(text, SEQUENCE)
