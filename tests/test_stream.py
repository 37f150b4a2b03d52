from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, inputs_of, randomised
from surgeon import fold, run
from surgeon.graph import Graph
from surgeon.module import load
from surgeon.passes import make
from surgeon.stream import StreamingExecutor


class Counting(dict[str, torch.Tensor]):
    """Weights read as fresh copies; how many bytes of them were alive at most."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__(values)
        self.alive = self.peak = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        read = super().__getitem__(name).clone()
        size = read.numel() * read.element_size()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(read, self._dropped, size)
        return read

    def _dropped(self, size: int) -> None:
        self.alive -= size


@torch.no_grad()
def expected(graph: Graph, inputs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    return list(load(graph, **options)(*inputs))


def assert_same(found: Any, wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "mixtral", "qwen3", "t5"])
def test_it_computes_what_the_module_computes(family: str) -> None:
    graph = graph_of(family)
    inputs = inputs_of(graph)
    assert_same(StreamingExecutor(graph)(*inputs), expected(graph, inputs))


def test_a_weight_through_a_weight_runs() -> None:
    graph = randomised(run.apply(graph_of("llama"), make("prefix", tokens=3, hidden=5)))
    inputs = inputs_of(graph)
    assert_same(StreamingExecutor(graph)(*inputs), expected(graph, inputs))


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {}), ("vera", {}), ("adalora", {"ranks": (("*.h.1.*", 0), ("*.c_fc", 2))})]
)
def test_adapted_and_merged_graphs_run(method: str, options: dict[str, Any]) -> None:
    graph = randomised(run.apply(graph_of("gpt2"), make(method, rank=3, targets="all-linear", **options)))
    inputs = inputs_of(graph)
    wanted = expected(graph, inputs)
    assert_same(StreamingExecutor(graph)(*inputs), wanted)
    assert_same(StreamingExecutor(fold.fold(graph))(*inputs), wanted)


def test_dropout_is_off() -> None:
    graph = run.apply(graph_of("bert"), make("lora", rank=3, dropout=0.5, targets="all-linear"))
    inputs = inputs_of(graph)
    once, again = (StreamingExecutor(randomised(graph))(*inputs) for _ in range(2))
    assert torch.equal(once[0], again[0])


def test_arithmetic_is_in_fp32_whatever_is_stored() -> None:
    base = graph_of("llama")
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in base.values.items()}
    graph = dataclasses.replace(base, values=half)
    inputs = inputs_of(graph)
    (found,) = StreamingExecutor(graph)(*inputs)
    assert found.dtype == torch.float32
    assert_same([found], expected(graph, inputs, dtype=torch.float32))
    (coarse,) = StreamingExecutor(graph, dtype=torch.bfloat16)(*inputs)
    assert coarse.dtype == torch.bfloat16


def test_one_weight_is_in_memory_at_a_time() -> None:
    base = graph_of("llama")
    values = Counting(base.values)
    StreamingExecutor(dataclasses.replace(base, values=values))(*inputs_of(base))
    sizes = [value.numel() * value.element_size() for value in base.values.values()]
    assert values.alive == 0
    assert values.peak <= 2 * max(sizes)
    assert values.peak < sum(sizes) / 4


def test_several_inputs_read_every_weight_once() -> None:
    base = graph_of("llama")
    reads: list[str] = []

    class Logged(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            reads.append(name)
            return super().__getitem__(name)

    lanes = [inputs_of(base, 1, length, seed=length) for length in (3, 5, 7)]
    results = StreamingExecutor(dataclasses.replace(base, values=Logged(base.values))).batch(lanes)
    matrices = [name for name in reads if base.values[name].dim() == 2]
    assert len(matrices) == len(set(matrices))
    for lane, result in zip(lanes, results, strict=True):
        assert_same(result, expected(base, lane))


def test_pages_are_released_after_every_layer() -> None:
    base, released = graph_of("llama"), []
    StreamingExecutor(base, release=lambda: released.append(1))(*inputs_of(base))
    assert len(released) >= len(base.layers)
