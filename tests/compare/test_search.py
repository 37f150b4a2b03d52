"""Which learning rate a search chooses, from losses that are given."""

from __future__ import annotations

import math

import pytest

from surgeon.compare.search import MOST_CONFIRMED, outside, search
from surgeon.errors import SurgeonError, UsageError


@pytest.mark.parametrize(
    ("losses", "beyond"),
    [
        ({1: 3.0, 3: 2.0, 9: 1.0}, 27),
        ({1: 1.0, 3: 2.0, 9: 3.0}, 1 / 3),
        ({1: 3.0, 3: 1.0, 9: 2.0}, None),
        ({1: 3.0, 3: 1.0, 9: math.inf}, None),
        ({1: 5.0, 3: 4.0, 9: 3.0, 27: 2.0, 81: 1.0}, None),
    ],
)
def test_the_search_goes_on_while_the_best_is_the_last(losses: dict[float, float], beyond: float | None) -> None:
    assert outside(losses) == beyond


def found(short: dict[float, float], whole: dict[float, float]) -> tuple[float, list[str]]:
    """What is chosen, and the rates that whole runs were asked of."""
    result = search(list(short)[:3], short.__getitem__, whole.__getitem__)
    return result.lr, list(result.whole)


def test_the_best_of_short_runs_and_the_next_lower_have_whole_ones() -> None:
    assert found({1: 3.0, 3: 1.5, 9: 2.0}, {3: 1.2, 1: 1.4}) == (3, ["3", "1"])
    assert found({1: 3.0, 3: 1.6, 9: 1.5, 27: 1.6}, {9: 1.0, 3: 1.1}) == (9, ["9", "3"])


def test_what_diverges_later_gives_way_to_a_lower_rate() -> None:
    assert found({1: 3.0, 3: 2.0, 9: 1.5, 27: 1.6}, {9: 4.0, 3: 1.4, 1: 1.6}) == (3, ["9", "3", "1"])
    assert found({1: 3.0, 3: 2.0, 9: 1.5, 27: 1.6}, {9: math.inf, 3: 1.8, 1: 1.9}) == (3, ["9", "3", "1"])


def test_no_more_than_a_few_whole_runs() -> None:
    short = {1: 3.0, 3: 2.5, 9: 2.0, 27: 1.5, 81: 1.0}
    lr, asked = found(short, {81: 5.0, 27: 4.0, 9: 3.0})
    assert (lr, len(asked)) == (9, MOST_CONFIRMED)


def test_a_rate_that_fails_is_out_and_the_lowest_must_not() -> None:
    def short(lr: float) -> float:
        if lr > failing:
            raise UsageError("not a number", "loss", "a lower rate")
        return 1 / lr

    failing = 5.0
    assert search([1, 3, 9], short, lambda lr: 0.1).lr == 3
    assert search([1, 3, 9, 27], {1: 4.0, 3: 3.0, 9: 2.0, 27: 3.0}.__getitem__, short).lr == 3
    assert search([1, 3, 9], lambda lr: 1 / lr, short).whole["9"] is None
    assert search([1, 3, 9], short, lambda lr: 0.1).tried["9"] is None
    failing = 0.5
    with pytest.raises(SurgeonError):
        search([1, 3, 9], short, lambda lr: 0.1)
