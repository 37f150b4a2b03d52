from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, randomised
from surgeon import fold, run
from surgeon.errors import CheckFailed, UsageError
from surgeon.graph import Graph
from surgeon.passes import make
from surgeon.verification import FLOOR, Probe, compare, make_probes, probe_inputs

NAME = "model.layers.1.self_attn.q_proj.weight"


def trained(dtype: torch.dtype = torch.float32) -> Graph:
    base = graph_of("llama")
    values = {name: t.to(dtype) if t.is_floating_point() else t for name, t in base.values.items()}
    graph = dataclasses.replace(base, values=values)
    return randomised(run.apply(graph, make("lora", rank=3, targets="all-linear")))


def changed(graph: Graph, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Graph:
    return dataclasses.replace(graph, values={**graph.values, name: change(graph.values[name].clone())})


def flipped(weight: torch.Tensor) -> torch.Tensor:
    """One weight's sign the other way."""
    row, column = divmod(int(weight.abs().argmax()), weight.shape[1])
    weight[row, column] *= -1
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_right_merge_is_within_the_bound(dtype: torch.dtype) -> None:
    graph = trained(dtype)
    merged = fold.fold(graph)
    found = compare(graph, merged, probes=make_probes(graph), rounded=merged)
    assert found.ok
    assert found.max_error <= found.bound / 1.9
    assert len(found.probes) == 3
    found.require("here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_flipped_weight_is_over_it(dtype: torch.dtype) -> None:
    graph = trained(dtype)
    merged = fold.fold(graph)
    found = compare(graph, changed(merged, NAME, flipped), probes=make_probes(graph), rounded=merged)
    assert not found.ok
    with pytest.raises(CheckFailed, match="not the same function") as caught:
        found.require("out/merged")
    assert caught.value.exit_code == 1
    assert caught.value.where == "out/merged"


def test_a_merge_twice_over_is_found() -> None:
    graph = trained()
    merged = fold.fold(graph)
    item = next(item for item in fold.folds(graph) if item.site.weight == NAME)
    p = item.tensors()
    twice = changed(merged, NAME, lambda weight: weight + (p["b"] @ p["a"]) * (16 / 3))
    assert not compare(graph, twice, probes=make_probes(graph), rounded=merged).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_ok(bad: float) -> None:
    graph = trained()
    merged = fold.fold(graph)

    def spoiled(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = bad
        return weight

    found = compare(graph, changed(merged, NAME, spoiled), probes=make_probes(graph), rounded=merged)
    assert not found.ok
    with pytest.raises(CheckFailed):
        found.require("x")


def test_nan_on_both_sides_is_not_ok() -> None:
    graph = changed(graph_of("llama"), NAME, lambda weight: weight * math.nan)
    assert not compare(graph, graph, probes=make_probes(graph)).ok
    assert not compare(graph, graph, probes=make_probes(graph), rounded=graph).ok


def test_the_same_graph_has_no_error() -> None:
    graph = graph_of("llama")
    found = compare(graph, graph, probes=make_probes(graph))
    assert (found.max_error, found.token_agreement) == (0.0, 1.0)
    assert found.bound == pytest.approx(1e-4 * found.largest)
    assert "torch.float32" in found.because
    assert found.peak_rss_bytes > 2**20
    with_rounded = compare(graph, graph, probes=make_probes(graph), rounded=graph)
    assert with_rounded.bound == pytest.approx(FLOOR * found.largest)


def test_agreement_counts_tokens() -> None:
    graph = graph_of("llama")
    head = changed(graph, "lm_head.weight", lambda weight: -weight)
    assert compare(graph, head, probes=make_probes(graph)).token_agreement < 0.2
    bert = compare(graph_of("bert"), graph_of("bert"), probes=make_probes(graph_of("bert")))
    assert bert.token_agreement == 1.0


def test_other_outputs_and_shapes_are_refused() -> None:
    graph = graph_of("llama")
    with pytest.raises(UsageError, match="the models return"):
        compare(graph, dataclasses.replace(graph, outputs=("other",)), probes=make_probes(graph))
    smaller = changed(graph, "lm_head.weight", lambda weight: weight[:50])
    with pytest.raises(UsageError, match="shapes"):
        compare(graph, smaller, probes=make_probes(graph))


def test_probes_are_the_same_every_time_and_fit_the_model() -> None:
    graph = graph_of("llama")
    probes = make_probes(graph)
    assert probes == make_probes(graph)
    assert [len(probe.ids) for probe in probes] == [16, 15, 14]
    assert max(max(probe.ids) for probe in probes) < 112
    texts = make_probes(graph, lambda text: {"input_ids": [5, 500, 6]})
    assert [probe.ids for probe in texts] == [(5, 6)] * 3


def test_probe_inputs_are_what_the_graph_asks_for() -> None:
    probe = Probe("x", (5, 6, 7, 8))
    t5 = graph_of("t5")
    given = dict(zip(t5.inputs, probe_inputs(t5, probe), strict=True))
    assert given["decoder_input_ids"].tolist() == [[6, 5]]
    assert given["attention_mask"].tolist() == [[1, 1, 1, 1]]
    bert = graph_of("bert")
    given = dict(zip(bert.inputs, probe_inputs(bert, probe), strict=True))
    assert given["token_type_ids"].tolist() == [[0, 0, 0, 0]]
    assert given["position_ids"].tolist() == [[0, 1, 2, 3]]
