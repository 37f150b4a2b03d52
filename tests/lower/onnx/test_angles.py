"""Angles of rotary embeddings: a table of all positions only where positions count in differences alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from benchmarks.zoo import graphs
from surgeon.lower.onnx import rotary
from surgeon.lower.onnx.angles import Angles

aten = torch.ops.aten
LIMIT, SIZE = 256, 16


def scaled(kind: str, **options: Any) -> tuple[torch.Tensor, float]:
    """The frequencies that transformers has for a kind of rotary embedding, and what cosines are multiplied by."""
    known = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **options}
    config = SimpleNamespace(
        rope_parameters=known, hidden_size=SIZE * 4, num_attention_heads=4, head_dim=SIZE,
        max_position_embeddings=LIMIT, standardize_rope_params=lambda: None,
    )  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(factor)


def trunk(write: Callable[[fx.Graph, fx.Node], fx.Node], factor: float = 1.0) -> tuple[fx.Graph, fx.Node, fx.Node]:
    """A trunk that makes cosines and sines of its positions."""
    part = fx.Graph()
    part.placeholder("input_ids")
    given = part.placeholder("position_ids")
    frequencies = part.get_attr("inv_freq")
    wide = part.call_function(aten.to.dtype, (part.call_function(aten.unsqueeze.default, (given, 2)), torch.float32))
    angles = part.call_function(aten.mul.Tensor, (write(part, wide), frequencies))
    both = part.call_function(aten.cat.default, ([angles, angles], -1))
    made = [part.call_function(function, (both,)) for function in (aten.cos.default, aten.sin.default)]
    cos, sin = (part.call_function(aten.mul.Tensor, (one, factor)) for one in made)
    part.output((cos, sin))
    return part, cos, sin


def angles_of(part: fx.Graph, frequencies: torch.Tensor, limit: int = LIMIT) -> Angles:
    graph = dataclasses.replace(graphs.graph_of("llama"), values={"inv_freq": frequencies}, inserted={})
    graph.tensors = {"inv_freq": dataclasses.replace(next(iter(graph.tensors.values())), shape=(SIZE // 2,))}
    return Angles(graph, part, limit)


def as_they_are(_: fx.Graph, wide: fx.Node) -> fx.Node:
    return wide


def by_the_last(part: fx.Graph, wide: fx.Node) -> fx.Node:
    """Dynamic scaling: what is at a position depends on the longest."""
    return part.call_function(aten.mul.Tensor, (wide, part.call_function(aten.max.default, (wide,))))


def from_the_middle(part: fx.Graph, wide: fx.Node) -> fx.Node:
    return part.call_function(aten.add.Tensor, (wide, 3.0))


def squared(part: fx.Graph, wide: fx.Node) -> fx.Node:
    return part.call_function(aten.mul.Tensor, (wide, wide))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama3", {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}),
        ("yarn", {"original_max_position_embeddings": 64}),
        ("linear", {}),
    ],
)
def test_scaled_frequencies_count_in_differences(kind: str, options: dict[str, Any]) -> None:
    frequencies, factor = scaled(kind, **options)
    part, cos, sin = trunk(as_they_are, factor)
    found = angles_of(part, frequencies)
    assert found.has(cos, rotary.HALVES)
    assert found.relative(cos, sin, rotary.HALVES)


@pytest.mark.parametrize("write", [by_the_last, from_the_middle, squared])
def test_what_is_no_multiple_of_the_position_does_not(write: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    part, cos, sin = trunk(write)
    found = angles_of(part, 1 / 100 ** (torch.arange(SIZE // 2) / SIZE))
    assert found.has(cos, rotary.HALVES)
    assert not found.has(cos, rotary.PAIRS)
    assert not found.relative(cos, sin, rotary.HALVES)


def test_tables_that_are_made_of_something_else_are_not_known() -> None:
    part, cos, sin = trunk(as_they_are)
    given = next(node for node in part.nodes if node.target == "position_ids")
    given.target = "inputs_embeds"
    found = angles_of(part, torch.ones(SIZE // 2))
    assert not found.has(cos, rotary.HALVES)
    assert not found.relative(cos, sin, rotary.HALVES)


def test_the_table_and_the_rows_are_the_models_own() -> None:
    """Of all positions, and of those at hand with the places of the tokens in them."""
    frequencies = 1 / 100 ** (torch.arange(SIZE // 2) / SIZE)
    part, cos, sin = trunk(as_they_are)
    found = angles_of(part, frequencies)
    made = [found.table(cos, rotary.HALVES), found.table(sin, rotary.HALVES)]
    made += [found.current(cos, rotary.HALVES), found.places(cos)]
    output: Any = next(iter(reversed(part.nodes)))
    output.args = (tuple(made),)
    for node in part.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    module = torch.nn.Module()
    module.register_buffer("inv_freq", frequencies)
    positions = torch.tensor([[0, 0, 1], [5, 6, 7]])
    all_cos, all_sin, current, places = fx.Interpreter(module, graph=part).run(torch.zeros(2, 3).long(), positions)
    expected = torch.arange(LIMIT)[:, None] * frequencies
    assert torch.equal(all_cos, expected.cos())
    assert torch.equal(all_sin, expected.sin())
    assert torch.equal(current[places], all_cos[positions])
