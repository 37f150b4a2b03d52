from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, inputs_of, randomised
from surgeon import run
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.module import load
from surgeon.passes import make
from surgeon.ranks import at_rank, highest_rank, set_rank


def stacked() -> Graph:
    return randomised(
        run.apply(graph_of("llama"), make("dylora", rank=4), make("lora", rank=2), make("dylora", rank=6))
    )


@torch.no_grad()
def test_every_adapter_goes_to_the_rank_or_to_its_own_and_others_stay() -> None:
    graph = stacked()
    assert highest_rank(graph) == 6
    five = at_rank(graph, 5)
    assert torch.equal(five.inserted["dylora.active"](), torch.ones(4))
    assert five.inserted["dylora_2.active"]().count_nonzero() == 5
    assert torch.equal(graph.inserted["dylora_2.active"](), torch.ones(6))
    model = load(graph)
    set_rank(model, 5)
    assert torch.equal(model(*inputs_of(graph))[0], load(five)(*inputs_of(graph))[0])
    set_rank(model, 6)
    assert torch.equal(model(*inputs_of(graph))[0], load(graph)(*inputs_of(graph))[0])


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_was_not_trained_is_refused(rank: int) -> None:
    with pytest.raises(UsageError, match=f"no rank {rank}") as caught:
        at_rank(stacked(), rank)
    assert "1 to 6" in caught.value.hint


def test_a_graph_without_such_an_adapter_is_refused() -> None:
    with pytest.raises(UsageError, match="no adapter here was trained at every rank") as caught:
        at_rank(run.apply(graph_of("llama"), make("lora")), 2)
    assert caught.value.where == "applied: lora"
