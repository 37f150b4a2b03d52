"""An encoder-decoder cut in two: the halves together compute what the model does, the states' keys and values once."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo import build, graphs
from surgeon import halves, module, run
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.passes import make
from tests.passes.test_kv_cache import PIECES, caches, call

FAMILIES = ("t5", "bart")
METHODS = {
    "lora": {"rank": 2},
    "prefix": {"tokens": 3, "sites": "encoder,decoder,cross"},
    "prompt": {"tokens": 3, "init": "normal"},
}


@torch.no_grad()
def in_pieces(graph: Graph, tokens: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Logits of a target that is given a piece at a time, to a decoder that is given the encoder's states."""
    encoder, decoder = halves.encoder_of(graph), run.apply(halves.decoder_of(graph), make("kv_cache"))
    states = call(module.load(encoder), tokens)[halves.RESULT]
    runner, kept, logits, start = module.load(decoder), caches(decoder, len(target)), [], 0
    for piece in PIECES:
        given = {"attention_mask": tokens["attention_mask"], halves.STATES: states}
        results = call(runner, {**given, halves.IDS: target[:, start : start + piece], **kept})
        kept = {name: results[name.replace("past_key_values", "present")] for name in kept}
        assert kept["past_key_values.1.encoder.value"].shape[2] == states.shape[1]
        logits.append(results["logits"])
        start += piece
    return torch.cat(logits, 1)


def given_to(family: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    config = graphs.graph_of(family).config
    tokens = build.tokens(config, 2, 9, padding=2)
    tokens["attention_mask"] = tokens["attention_mask"].flip(1)
    return tokens, build.tokens(config, 2, sum(PIECES), seed=1)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_halves_are_the_model(family: str) -> None:
    tokens, target = given_to(family)
    with torch.no_grad():
        whole = graphs.model_of(family)(**tokens, decoder_input_ids=target).logits
    torch.testing.assert_close(in_pieces(graphs.graph_of(family), tokens, target), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_cut_along(method: str) -> None:
    tokens, target = given_to("bart")
    graph = graphs.randomised(run.apply(graphs.graph_of("bart"), make(method, **METHODS[method])))
    ones = torch.ones_like(target)
    with torch.no_grad():
        whole = call(module.load(graph), {**tokens, halves.IDS: target, halves.MASK: ones})["logits"]
    torch.testing.assert_close(in_pieces(graph, tokens, target), whole, atol=1e-5, rtol=1e-5)


def test_each_half_has_its_own_tensors_and_inputs() -> None:
    graph = graphs.graph_of("t5")
    before = graph.text()
    encoder, decoder = halves.encoder_of(graph), halves.decoder_of(graph)
    assert graph.text() == before
    assert encoder.inputs == ("input_ids", "attention_mask")
    assert set(decoder.inputs) == {"attention_mask", halves.IDS, halves.STATES}
    assert set(encoder.tensors) & set(decoder.tensors) == {"shared.weight"}
    assert set(encoder.tensors) | set(decoder.tensors) == set(graph.tensors)
    again = halves.renamed(decoder, {halves.IDS: "input_ids"})
    assert "input_ids" in again.inputs
    assert "input_ids" not in decoder.inputs


def test_a_decoder_alone_has_no_halves() -> None:
    with pytest.raises(UnsupportedError, match="the decoder of llama reads 0 results of the encoder, and not one"):
        halves.encoder_of(graphs.graph_of("llama"))
