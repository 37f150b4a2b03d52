"""The language-model head is found where it is one, and computes the logits from the hidden states."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, inputs_of
from surgeon.head import find_head
from surgeon.module import load

HEADS = {"llama": 0.0, "gemma2": 3.0, "gpt2": 0.0, "qwen3": 0.0, "t5": 0.0, "bart": None}


@pytest.mark.parametrize("family", HEADS)
@torch.no_grad()
def test_body_and_head_are_the_logits(family: str) -> None:
    graph = graph_of(family)
    head = find_head(graph)
    if HEADS[family] is None:
        assert head is None
        return
    assert head is not None
    assert head.softcap == HEADS[family]
    loaded, inputs = load(graph), inputs_of(graph)
    hidden = loaded.run(head.body, *inputs)[0]
    logits = hidden @ loaded.get_parameter(head.weight).T * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    assert torch.allclose(logits, loaded(*inputs)[0], atol=1e-5)


def test_other_outputs_have_no_head() -> None:
    assert find_head(graph_of("bert", "features")) is None
