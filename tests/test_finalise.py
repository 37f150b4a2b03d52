"""What stays an adapter in its final form: constants, with nothing that only training needs."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.zoo.graphs import graph_of, inputs_of, randomised
from surgeon import run
from surgeon.finalise import finalise
from surgeon.passes import make
from surgeon.stream import StreamingExecutor

STEPS: dict[str, dict[str, Any]] = {
    "prefix": {"tokens": 3, "hidden": 5, "dropout": 0.2},
    "prompt": {"tokens": 2, "init": "normal"},
    "lora": {"rank": 2, "targets": "all-linear"},
}


@pytest.mark.parametrize("names", [("prefix",), ("lora", "prefix", "prompt")], ids="-".join)
def test_the_mlp_is_gone_and_the_function_is_the_same(names: tuple[str, ...]) -> None:
    graph = randomised(run.apply(graph_of("gemma2"), *(make(name, **STEPS[name]) for name in names)))
    final = finalise(graph)
    assert [step.name for step in final.applied] == [name for name in names if name != "lora"]
    plain = make("prefix", tokens=3)
    assert final.applied[0].spec().partition(", roles")[0] == plain.spec().removesuffix(")")
    assert {name.rpartition(".")[2] for name in final.inserted} <= {"k", "v", "rows"}
    inputs = inputs_of(graph)
    expected, found = (StreamingExecutor(one)(*inputs)[0] for one in (graph, final))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_is_final_is_left_alone() -> None:
    graph = run.apply(graph_of("gemma2"), make("prefix", tokens=3))
    assert finalise(graph) is graph
