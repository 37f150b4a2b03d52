"""Presets: what they stand for, whose options they take, and that every one can be applied."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.zoo.graphs import graph_of
from surgeon import run
from surgeon.cli.methods import chosen
from surgeon.errors import UsageError
from surgeon.options import options_of
from surgeon.passes import find
from surgeon.planning import plan
from surgeon.presets import PRESETS, passes_of, steps_of


def small(name: str) -> dict[str, Any]:
    """Options that fit tiny layers."""
    return {"rank": 2, **({"group": 16} if name != "qlora" else {})}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_applied(name: str) -> None:
    steps = steps_of(name, small(name))
    graph = run.apply(graph_of("llama"), *steps)
    assert [step.name for step in graph.applied] == list(passes_of(name))
    assert graph.trainable()
    assert plan(graph_of("llama"), *steps).trainable_parameters == sum(s.count for s in graph.trainable().values())


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_preset_names_are_options(name: str) -> None:
    for step, options in PRESETS[name].steps:
        assert set(options) <= {option.name for option in options_of(find(step))}


def test_options_go_to_the_passes_that_have_them() -> None:
    lora, sparse = steps_of("longlora", {"rank": 3, "group": 8})
    assert lora.options()["rank"] == 3
    assert sparse.options()["group"] == 8
    assert lora.options()["targets"] == "attention-linear"


def test_the_command_line_overrides_a_preset_and_parentheses_the_command_line() -> None:
    lora, sparse = chosen(["longlora(rank=3)"], {"rank": "5", "targets": "*.q_proj", "wrap": True})
    assert lora.options()["rank"] == 3
    assert lora.options()["targets"] == "*.q_proj"
    assert sparse.options()["wrap"]


def test_an_option_of_none_of_its_passes() -> None:
    with pytest.raises(UsageError, match="longlora has no option 'tokens'"):
        steps_of("longlora", {"tokens": 3})
    with pytest.raises(UsageError, match="no option --tokens"):
        chosen(["longlora"], {"tokens": "3"})
