"""Rotary embeddings are known by what they compute, however they are written, and what is none stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from benchmarks.zoo import graphs
from surgeon import run
from surgeon.graph import copied
from surgeon.lower.onnx import gqa, rotary
from surgeon.passes import make

HEADS, SIZE = 4, 16
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Llama."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def partial(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Phi, GPT-NeoX: the first channels alone."""
    size = cos.shape[-1]
    return torch.cat((halves(x[..., :size], cos, sin), x[..., size:]), -1)


def pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Cohere: neighbours, in fp32."""
    wide = x.float()
    other = torch.stack([-wide[..., 1::2], wide[..., ::2]], -1).flatten(-2)
    return (wide * cos.unsqueeze(1) + other * sin.unsqueeze(1)).to(x.dtype)


def once(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """gpt-oss: every angle once."""
    first, second = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def other_way(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """By the angle backwards: no rotary embedding."""
    return halves(x, cos, -sin)


def bent(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Not linear in x."""
    return halves(x, cos, sin) + 1e-3 * x * x


def added(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Learned positions, say."""
    return x + cos.unsqueeze(1) + sin.unsqueeze(1)


def layer(write: Write, width: int) -> fx.Node:
    """The last node of a layer that turns a projection, `[b, h, t, d]`."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(HEADS * SIZE, 8))

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            rows = torch.nn.functional.linear(x, self.weight)
            heads = rows.view(x.shape[0], x.shape[1], HEADS, SIZE).transpose(1, 2)
            return write(heads, cos, sin)

    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    given = (torch.zeros(2, 5, 8), torch.zeros(2, 5, width), torch.zeros(2, 5, width))
    program = torch.export.export(Layer(), given, dynamic_shapes=(dims, dims, dims))
    graph, _ = copied(program.graph)
    weight = next(node for node in graph.nodes if "weight" in node.name)
    with graph.inserting_before(weight):
        read = graph.get_attr("weight")
    read.meta = dict(weight.meta)
    weight.replace_all_uses_with(read)
    output: Any = next(iter(reversed(graph.nodes)))
    found: fx.Node = output.args[0][0]
    return found


@pytest.mark.parametrize(
    ("write", "width", "expected"),
    [
        (halves, SIZE, (SIZE, False, rotary.HALVES)),
        (partial, 6, (6, False, rotary.HALVES)),
        (pairs, SIZE, (SIZE, True, rotary.PAIRS)),
        (once, SIZE // 2, (SIZE, False, rotary.ONCE)),
    ],
)
def test_rotations_are_known(write: Write, width: int, expected: tuple[int, bool, str]) -> None:
    node = layer(write, width)
    found = rotary.find(node)
    assert found is not None
    assert (found.channels, found.pairs, found.table) == expected
    assert (found.cos.name, found.sin.name) == ("cos", "sin")
    assert tuple(found.x.meta["val"].shape)[1::2] == (HEADS, SIZE)


@pytest.mark.parametrize("write", [other_way, bent, added])
def test_what_is_no_rotation_is_none(write: Write) -> None:
    assert rotary.find(layer(write, SIZE)) is None


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", "RotaryEmbedding"),
        *(pytest.param(family, "none found", marks=pytest.mark.slow) for family in ("opt", "gpt2", "llama4_text")),
        *(pytest.param(family, "RotaryEmbedding", marks=pytest.mark.slow) for family in ("phi", "gpt_neox", "gpt_oss")),
    ],
)
def test_what_computes_those_of_a_model(family: str, expected: str) -> None:
    """Heads of 8 channels are too small for the operator's own; Llama 4 multiplies complex numbers."""
    cached = run.apply(graphs.graph_of(family), make("kv_cache"))
    fused = gqa.fuse(cached)
    assert not fused.reasons
    assert {how: len(paths) for how, paths in fused.rotary.items()} == {expected: 4}
    assert ("position_ids" in fused.graph.inputs) == ("position_ids" in cached.inputs)
