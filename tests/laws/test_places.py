"""The laws of adapters at the places only a low-rank bypass has: experts, parts of projections, convolutions."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.zoo import build
from benchmarks.zoo.custom import OddConfig
from benchmarks.zoo.graphs import close, graph_of, graph_over, inputs_of, outputs_of, randomised
from benchmarks.zoo.oracles import exported_again
from surgeon import fold, run
from surgeon.graph import Graph
from surgeon.module import load
from surgeon.passes import make
from surgeon.passes.base import Adapter
from surgeon.planning import plan

PLACES: dict[str, dict[str, Any]] = {
    "mixtral": {"targets": "*.experts.*"},
    "llama4_text": {"targets": "*.experts.*"},
    "gpt_neox": {"targets": "query_key_value", "parts": "q,v"},
    "odd": {"targets": "plain,grouped,dilated,plane,attend,out_proj", "exclude": ""},
}
everywhere = pytest.mark.parametrize("family", PLACES)
either = pytest.mark.parametrize("name", ["lora", "dylora"])


@functools.cache
def base_of(family: str) -> Graph:
    if family != "odd":
        return graph_of(family)
    return graph_over(build.build(OddConfig(), "base"), OddConfig(), "features")


def step_of(name: str, family: str) -> Adapter:
    options = dict(PLACES[family])
    if (name, family) == ("dylora", "odd"):
        options["exclude"] = "grouped"  # whose groups would draw a rank each
    made = make(name, rank=4, alpha=4.0, **options)
    assert isinstance(made, Adapter)
    return made


@functools.cache
def applied(name: str, family: str) -> Graph:
    return run.apply(base_of(family), step_of(name, family))


@either
@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_changes_when_it_is_inserted(name: str, family: str, dtype: torch.dtype) -> None:
    for shape in ((2, 7), (1, 3)):
        assert torch.equal(*(outputs_of(graph, shape, dtype) for graph in (base_of(family), applied(name, family))))


@either
@everywhere
def test_exactly_the_declared_parameters_train(name: str, family: str) -> None:
    graph = applied(name, family)
    model = load(randomised(graph)).train()
    model(*inputs_of(graph))[0].square().sum().backward()
    found = {full for full, parameter in model.named_parameters() if parameter.grad is not None}
    assert found == set(graph.trainable())
    assert all(model.get_parameter(full).grad.any() for full in found)  # type: ignore[union-attr]
    planned = plan(base_of(family), step_of(name, family))
    assert planned.trainable_parameters == sum(spec.count for spec in graph.trainable().values())
    assert planned.site_count == len({full.rpartition(".")[0] for full in graph.trainable()})


@either
@everywhere
def test_merging_changes_nothing_and_leaves_nothing(name: str, family: str) -> None:
    base, trained = base_of(family), randomised(applied(name, family))
    assert (outputs_of(trained) - outputs_of(base)).abs().max() > 1e-2
    merged = fold.fold(trained)
    assert (merged.text(), merged.tensors, merged.inserted) == (base.text(), base.tensors, base.inserted)
    assert [paths for _, paths in merged.groups()] == [paths for _, paths in base.groups()]
    assert [paths for _, paths in trained.groups()] == [paths for _, paths in base.groups()]
    for shape in ((2, 7), (1, 3)):
        assert close(outputs_of(merged, shape), outputs_of(trained, shape))


@everywhere
@pytest.mark.parametrize("names", [("lora", "dylora"), ("dylora", "lora"), ("lora", "lora")], ids="-".join)
def test_they_stack(names: tuple[str, str], family: str) -> None:
    first, second = (step_of(name, family) for name in names)
    both = randomised(run.apply(base_of(family), first, second), std=0.1)
    merged = fold.fold(both)
    assert merged.text() == base_of(family).text()
    assert close(outputs_of(merged), outputs_of(both))
    one_less = fold.without(both, {names[0]})
    assert len(one_less.applied) == 1
    assert len(one_less.trainable()) == len(applied(names[1], family).trainable())


@pytest.mark.parametrize("family", [*PLACES][::2] + [pytest.param(f, marks=pytest.mark.slow) for f in [*PLACES][1::2]])
@torch.no_grad()
def test_the_result_exports_again(family: str) -> None:
    assert exported_again(randomised(applied("lora", family)))
