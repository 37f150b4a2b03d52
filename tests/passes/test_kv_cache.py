"""The K/V cache: a text in pieces gives what transformers' own cached forward gives, or a refusal by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, Lfm2Config

from benchmarks.zoo import build, families, graphs
from benchmarks.zoo.causal import causal_config
from surgeon import module, run
from surgeon.capture import capture_config
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.passes import make

DECODERS = (
    "llama", "gemma2", "gemma3_text", "gemma3n_text", "llama4_text", "gpt_oss", "deepseek_v3", "gpt2", "mistral",
    "qwen3", "olmo2", "phi", "phi3", "gpt_neox", "opt", "mixtral", "qwen3_moe",
)  # fmt: skip
PIECES = (4, 1, 3, 1, 1)  # past the window of 5, with several new tokens after a past
PADDING = 2


def caches(graph: Graph, batch: int) -> dict[str, torch.Tensor]:
    """Empty keys and values for every cache input."""
    inputs = [node for node in graph.trunk.nodes if node.op == "placeholder"]
    shapes = {name: node.meta["val"].shape for name, node in zip(graph.inputs, inputs, strict=True)}
    return {name: torch.zeros(batch, s[1], 0, s[3]) for name, s in shapes.items() if name.startswith("past_")}


def call(runner: module.GraphModule, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs by name, of inputs by name."""
    results = runner(*[given[name] for name in runner.graph.inputs])
    return dict(zip(runner.graph.outputs, results, strict=True))


@torch.no_grad()
def in_pieces(graph: Graph, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits of a text that is given a piece at a time."""
    runner, kept, logits, start = module.load(graph), caches(graph, len(ids)), [], 0
    for piece in PIECES:
        now = slice(start, start + piece)
        given = {"input_ids": ids[:, now], "attention_mask": mask[:, : now.stop], "position_ids": positions[:, now]}
        results = call(runner, {**given, **kept})
        kept = {name: results[name.replace("past_key_values", "present")] for name in kept}
        logits.append(results["logits"])
        start += piece
    return torch.cat(logits, 1)


@torch.no_grad()
def cached_reference(model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """transformers' own forward with its own cache, over the same pieces."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for piece in PIECES:
        now = slice(start, start + piece)
        output = model(
            input_ids=ids[:, now], attention_mask=mask[:, : now.stop], position_ids=positions[:, now],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        logits.append(output.logits)
        start += piece
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", DECODERS)
def test_pieces_equal_transformers_cached_forward(family: str) -> None:
    base, model = graphs.graph_of(family), graphs.model_of(family)
    graph = run.apply(base, make("kv_cache"))
    tokens = build.tokens(model.config, 2, sum(PIECES), padding=PADDING)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours, theirs = (f(x, ids, mask, positions) for f, x in ((in_pieces, graph), (cached_reference, model)))
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)
    assert len(graph.groups()) == len(base.groups())  # layers that share a graph still do
    assert graph.outputs[:3] == ("logits", "present.0.key", "present.0.value")
    assert graph.inputs[len(base.inputs) :][:2] == ("past_key_values.0.key", "past_key_values.0.value")


def test_gemma3n_has_one_cache_per_distinct_keys() -> None:
    graph = run.apply(graphs.graph_of("gemma3n_text"), make("kv_cache"))
    names = [name for name in graph.inputs if name.endswith(".key")]
    config = families.tiny_config("gemma3n_text")
    assert names == [f"past_key_values.{i}.key" for i in range(config.num_hidden_layers - config.num_kv_shared_layers)]


def test_two_attentions_of_one_layer_have_their_own_caches() -> None:
    model = build.build(causal_config("diffllama"))  # both halves of its difference read the same keys, other values
    base = capture_config(model.config, "causal-lm")
    base.values = {**model.state_dict(), **dict(model.named_buffers())}
    graph = run.apply(base, make("kv_cache"))
    tokens = build.tokens(model.config, 2, sum(PIECES), padding=PADDING)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits
    ours = in_pieces(graph, ids, mask, positions)
    torch.testing.assert_close(ours[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)


def test_adapters_and_cache_compose() -> None:
    adapted = graphs.randomised(run.apply(graphs.graph_of("llama"), make("lora", rank=2), make("vera", rank=4)))
    graph = run.apply(adapted, make("kv_cache"))
    tokens = build.tokens(graph.config, 2, sum(PIECES), padding=PADDING)
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = module.load(adapted)(ids, mask, positions)[0]
    ours = in_pieces(graph, ids, mask, positions)
    torch.testing.assert_close(ours[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=1e-5)


def test_the_graph_without_a_cache_is_not_touched() -> None:
    base = graphs.graph_of("gemma2")
    before = base.text()
    run.apply(base, make("kv_cache"))
    assert base.text() == before


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoder_steps_equal_transformers(family: str) -> None:
    base, model = graphs.graph_of(family), graphs.model_of(family)
    prefill, step = (run.apply(base, make("kv_cache", phase=phase)) for phase in ("prefill", "step"))
    tokens = build.tokens(model.config, 2, 6, padding=PADDING)
    target = build.tokens(model.config, 2, sum(PIECES), seed=1)["input_ids"]
    ones = torch.ones_like(target)
    cache, kept, start = EncoderDecoderCache(DynamicCache(), DynamicCache()), {}, 0
    for piece in PIECES:
        now = slice(start, start + piece)
        given = {**tokens, "decoder_input_ids": target[:, now], "decoder_attention_mask": ones[:, : now.stop]}
        with torch.no_grad():
            results = call(module.load(step if kept else prefill), {**given, **kept})
            theirs = model(**{**given, "past_key_values": cache, "use_cache": True}).logits
        torch.testing.assert_close(results["logits"], theirs, atol=1e-5, rtol=1e-5)
        kept |= {n.replace("present", "past_key_values"): x for n, x in results.items() if n != "logits"}
        start += piece


def test_an_encoder_decoder_step_has_no_encoder() -> None:
    step = run.apply(graphs.graph_of("bart"), make("kv_cache", phase="step"))
    assert "input_ids" not in step.inputs
    assert not [name for name in (*step.layers, *step.tensors) if "encoder.layers" in name and "decoder" not in name]
    assert {"past_key_values.0.decoder.key", "past_key_values.0.encoder.key"} <= set(step.inputs)
    assert not [name for name in step.outputs if ".encoder." in name]


def test_a_model_without_an_attention_node_is_refused() -> None:
    graph = capture_config(causal_config("prophetnet"), "causal-lm")
    with pytest.raises(UnsupportedError, match="kv_cache needs an attention node, and prophetnet was captured without"):
        run.apply(graph, make("kv_cache"))


def test_recurrent_state_is_refused_by_its_place() -> None:
    config = Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, layer_types=["conv", "full_attention"],
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="lfm2 carries state from token to token") as error:
        run.apply(capture_config(config, "causal-lm"), make("kv_cache"))
    assert error.value.where.startswith("model.layers.0.conv")


def test_encoders_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="needs a model that generates"):
        run.apply(graphs.graph_of("bert"), make("kv_cache"))


def test_the_two_graphs_of_an_encoder_decoder_are_named() -> None:
    with pytest.raises(UsageError, match="two graphs"):
        run.apply(graphs.graph_of("bart"), make("kv_cache"))


def test_unknown_phase_and_second_application() -> None:
    with pytest.raises(UsageError, match="phase is 'decode'"):
        make("kv_cache", phase="decode")
    once = run.apply(graphs.graph_of("llama"), make("kv_cache"))
    with pytest.raises(UsageError, match="already applied"):
        run.apply(once, make("kv_cache"))
