"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from surgeon.examples import Question
from surgeon.labels import Labels
from surgeon.metrics import answering, classification, entities, regression, tagging

TAGS = Labels(("B-LOC", "B-PER", "I-LOC", "I-PER", "O"))


def test_two_classes_have_the_f1_of_the_second() -> None:
    found = classification(torch.tensor([1, 1, 0, 1]), torch.tensor([1, 0, 0, 0]), Labels(("neg", "pos")))
    assert found == pytest.approx({"accuracy": 0.5, "f1": 0.5, "f1_macro": 0.5})


def test_the_macro_average_is_over_classes_that_occur() -> None:
    found = classification(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), Labels(("a", "b", "c")))
    assert found == pytest.approx({"accuracy": 2 / 3, "f1_macro": 2 / 3})


def test_regression() -> None:
    found = regression(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 5.0]))
    assert found["mse"] == pytest.approx(2 / 3)
    assert found["mae"] == pytest.approx(2 / 3)
    assert found["pearson"] == pytest.approx(0.98198, abs=1e-4)
    assert found["spearman"] == pytest.approx(1.0, abs=1e-5)
    assert set(regression(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0]))) == {"mse", "mae"}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O B-PER I-PER O B-LOC", [("PER", 1, 2), ("LOC", 4, 4)]),
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("I-PER I-PER O I-PER", [("PER", 0, 1), ("PER", 3, 3)]),
        ("O O", []),
        ("B-a-b I-a-b", [("a-b", 0, 1)]),
    ],
)
def test_entities_of_tags(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags.split()) == expected


def test_entities_count_whole() -> None:
    ids = {name: number for number, name in enumerate(TAGS.names)}
    right = [[ids[t] for t in ["B-PER", "I-PER", "O", "B-LOC"]], [ids["B-LOC"]]]
    guess = [[ids[t] for t in ["B-PER", "O", "O", "B-LOC"]], [ids["O"]]]
    found = tagging(guess, right, TAGS)
    assert found == pytest.approx({"accuracy": 3 / 5, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5})
    plain = tagging([[0, 1]], [[0, 0]], Labels(("NOUN", "VERB")))
    assert set(plain) == {"accuracy", "f1_macro"}
    assert tagging([[4]], [[4]], TAGS)["f1"] == 0.0


def test_squad() -> None:
    context = "the tower in paris"
    offsets = (None, (0, 3), (4, 9), (10, 12), (13, 18))
    asked = [Question(context, ("Tower.", "x"), (0,), (offsets,), (0,)), Question(context, (), (1,), (offsets,), (0,))]
    start, end = torch.zeros(2, 5), torch.zeros(2, 5)
    start[0, 1] = end[0, 2] = 5.0  # "the tower": articles and points do not count
    start[1, 0] = end[1, 0] = 5.0
    assert answering(asked, list(start), list(end)) == {"exact_match": 1.0, "f1": 1.0}
    end[0, 4] = 9.0  # "the tower in paris": one word of three is right
    found = answering(asked, list(start), list(end))
    assert found["exact_match"] == 0.5
    assert found["f1"] == pytest.approx((0.5 + 1) / 2)
    only = answering(asked[:1], list(start), list(end))
    assert only["exact_match"] == 0.0
