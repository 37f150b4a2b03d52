"""The language-model head is found where it is one, and computes the logits from the hidden states."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, inputs_of, randomised
from surgeon import run
from surgeon.head import find_head
from surgeon.model import load_model
from surgeon.module import load
from surgeon.passes import make

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


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_rows_of_a_tied_head_are_part_of_it(family: str) -> None:
    graph = randomised(run.apply(graph_of(family), make("token_rows", tokens="7,3")))
    head, model, ids = find_head(graph), load_model(graph), inputs_of(graph)[0]
    assert head is not None
    assert (head.rows, head.index) == ("token_rows.rows", "token_rows.index")
    output = model(input_ids=ids, labels=ids)
    logits = model(input_ids=ids).logits
    assert output.loss is not None
    assert logits is not None
    assert torch.allclose(output.logits, logits, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    grads = [torch.autograd.grad(loss, model.get_parameter(head.rows))[0] for loss in (output.loss, expected)]
    assert torch.allclose(output.loss, expected, atol=1e-5)
    assert torch.allclose(grads[0], grads[1], atol=1e-5)
    assert grads[0].abs().max() > 1e-4
