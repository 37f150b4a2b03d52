"""The options of training are checked before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from surgeon.errors import UsageError
from surgeon.recipe import Recipe, make_recipe


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"lr": -1.0}, "lr = -1.0 is not above 0"),
        ({"lr": float("nan")}, "lr = nan is not above 0"),
        ({"batch_size": 0}, "batch_size = 0 is not above 0"),
        ({"steps": 0}, "steps = 0 is not above 0"),
        ({"steps": 1, "epochs": 2}, "both steps and epochs"),
        ({"warmup": -1}, "warmup = -1 is below 0"),
        ({"scheduler": "cosin"}, "unknown scheduler `cosin`"),
        ({"precision": "fp16"}, "unknown precision `fp16`"),
        ({"learning_rate": 1.0}, "unknown option `learning_rate`"),
    ],
)
def test_bad_options(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe(options)
    assert what in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "total"),
    [({"steps": 7}, 7), ({}, 3), ({"epochs": 2}, 6), ({"epochs": 0.5}, 2), ({"epochs": 0.01}, 1)],
)
def test_total_steps(options: dict[str, Any], total: int) -> None:
    """10 samples in batches of 2, two batches a step: an epoch is 3 steps."""
    assert Recipe(batch_size=2, gradient_accumulation=2, **options).total_steps(10) == total


def test_warmup_is_a_share_or_a_count() -> None:
    assert [Recipe(warmup=warmup).warmup_steps(100) for warmup in (0, 0.05, 1, 30)] == [0, 5, 1, 30]
