"""Architectures with attention code of their own: their nodes, their cache, their prefix, beside transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.deberta_v2 import modeling_deberta_v2
from transformers.models.distilbert import modeling_distilbert

from benchmarks.zoo import build, families, graphs
from benchmarks.zoo.causal import causal_config
from surgeon import module, run
from surgeon.capture import capture_config
from surgeon.errors import UnsupportedError
from surgeon.generate import generator
from surgeon.graph import Graph
from surgeon.lengths import ATTENTION_OP
from surgeon.passes import make

# What the node of each architecture says: scale is in every one, and so are the keys' padding and causality.
OPTIONS: dict[str, dict[str, Any]] = {
    "bloom": {"causal": True}, "falcon": {"causal": True}, "falcon-alibi": {"causal": True},
    "codegen": {"causal": True}, "gptj": {"causal": True}, "mpt": {"causal": True}, "deberta-v2": {"dropout_p": 0.1},
}  # fmt: skip
BIASED = ("bloom", "falcon-alibi", "mpt", "deberta-v2")
MORE = {
    "openai-gpt": {"causal": True, "dropout_p": 0.1}, "gpt_neo": {"causal": True}, "xlm": {"dropout_p": 0.1},
    "roformer": {"causal": True, "dropout_p": 0.1}, "megatron-bert": {"causal": True, "dropout_p": 0.1},
    "rembert": {"causal": True}, "xglm": {"causal": True, "dropout_p": 0.1}, "mvp": {"causal": True},
    "trocr": {"causal": True}, "gpt_neox_japanese": {"causal": True, "dropout_p": 0.1},
}  # fmt: skip
CACHED = ("bloom", "falcon", "falcon-alibi", "codegen", "gptj", "mpt")
TOKENS = 3


@functools.cache
def both(name: str) -> tuple[Any, Graph]:
    """The model in the implementation that was captured, and its graph."""
    if name in families.NAMES:
        model, graph = graphs.model_of(name), graphs.graph_of(name)
    else:
        model = build.build(causal_config(name))
        graph = graphs.graph_over(model, model.config, "causal-lm")
    if "attention recognised in its sdpa code" in graph.notes:
        other = type(model)._from_config(model.config, attn_implementation="sdpa", dtype=torch.float32).eval()
        other.load_state_dict(model.state_dict())
        model = other
    return model, graph


def nodes(graph: Graph) -> list[torch.fx.Node]:
    return [node for part, _ in graph.parts() for node in part.nodes if node.target is ATTENTION_OP]


def given(graph: Graph, tokens: dict[str, Tensor], first: int = 0) -> list[Tensor]:
    """The graph's inputs for a batch; positions as transformers counts them."""
    positions = (tokens["attention_mask"].cumsum(-1) - 1).clamp(min=0) + first
    known = {**tokens, "position_ids": positions, "token_type_ids": torch.zeros_like(positions)}
    return [known[name] for name in graph.inputs]


def check_nodes(name: str, options: dict[str, Any]) -> None:
    graph = both(name)[1]
    found = nodes(graph)
    assert found
    for node in found:
        known = {key: value for key, value in node.kwargs.items() if key not in ("scale", "window")}
        assert known == options
        assert str(node.args[3].target) == "attention_mask"
        assert (len(node.args) > 4) == (name in BIASED)
        assert node.args[0].meta["val"].dim() == 4
    for part, _ in graph.parts():
        assert "softmax" not in " ".join(str(node.target) for node in part.nodes)


def check_logits(name: str) -> None:
    model, graph = both(name)
    tokens = build.tokens(model.config, 3, 9, padding=4)
    with torch.no_grad():
        ours = module.load(graph)(*given(graph, tokens))[0]
        positions = dict(zip(graph.inputs, given(graph, tokens), strict=True)).get("position_ids")
        theirs = model(**tokens, **({} if positions is None else {"position_ids": positions}))[0]
    seen = tokens["attention_mask"].bool()
    torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_node_says_what_the_code_computed(name: str) -> None:
    check_nodes(name, OPTIONS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_architectures(name: str) -> None:
    check_nodes(name, MORE[name])
    check_logits(name)


def test_local_attention_has_its_window() -> None:
    windows = [node.kwargs.get("window") for node in nodes(both("gpt_neo")[1])]
    assert windows == [None, causal_config("gpt_neo").window_size]


@pytest.mark.parametrize("name", ["codegen", "gptj", "mpt"])
def test_logits_equal_transformers(name: str) -> None:
    check_logits(name)


@pytest.mark.parametrize("name", CACHED)
def test_generation_through_the_cache_equals_transformers(name: str) -> None:
    model, graph = both(name)
    ours = generator(module.load(graph))
    assert ours.has_cache
    tokens = build.tokens(model.config, 2, 7, padding=3)
    made = [one.generate(**tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False) for one in (model, ours)]
    assert torch.equal(*made)


def columns(graph: Graph) -> tuple[Graph, list[tuple[Tensor, Tensor]]]:
    """The graph with a random prefix, and its keys and values by layer."""
    tuned = graphs.randomised(run.apply(graph, make("prefix", tokens=TOKENS)))
    names = [name for name in tuned.trainable() if name.endswith(".k")]
    return tuned, [(tuned.inserted[name](), tuned.inserted[f"{name[:-2]}.v"]()) for name in names]


def cache_of(held: list[tuple[Tensor, Tensor]]) -> transformers.DynamicCache:
    """transformers' cache with those columns in it, for two texts."""
    cache = transformers.DynamicCache()
    for layer, (k, v) in enumerate(held):
        cache.update(k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), layer)
    return cache


@pytest.mark.parametrize("name", ["codegen", "gptj", "falcon"])
@torch.no_grad()
def test_a_prefix_is_what_transformers_cache_holds(name: str) -> None:
    model, graph = both(name)
    tuned, held = columns(graph)
    tokens = build.tokens(model.config, 2, 6, padding=2)
    ours = module.load(tuned)(*given(tuned, tokens))[0]
    cache = cache_of(held)
    mask = torch.cat([torch.ones(2, TOKENS, dtype=torch.int64), tokens["attention_mask"]], 1)
    positions = given(graph, tokens, TOKENS)[graph.inputs.index("position_ids")]
    theirs = model(tokens["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache)[0]
    seen = tokens["attention_mask"].bool()
    torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "falcon-alibi", "mpt"])
@torch.no_grad()
def test_alibi_counts_the_columns_of_a_prefix(name: str) -> None:
    model, graph = both(name)
    tuned, held = columns(graph)
    tokens = build.tokens(model.config, 2, 6, padding=2)
    loaded = module.load(tuned)
    ours = loaded(*given(tuned, tokens))[0]
    cache = cache_of(held)
    mask = torch.cat([torch.ones(2, TOKENS, dtype=torch.int64), tokens["attention_mask"]], 1)
    theirs = model(tokens["input_ids"], attention_mask=mask, past_key_values=cache)[0]
    seen = tokens["attention_mask"].bool()
    torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-5, rtol=1e-5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, whole = (generator(loaded).generate(**tokens, **options, use_cache=use) for use in (True, False))
    assert generator(loaded).has_cache
    assert torch.equal(cached, whole)


def deberta_with(
    held: tuple[Tensor, Tensor], self: Any, states: Tensor, mask: Tensor, *positional: Any, **named: Any
) -> Any:
    """Disentangled attention as in the paper, with columns at which every token looks, at no relative position."""
    names = ("output_attentions", "query_states", "relative_pos", "rel_embeddings")
    options = {**dict(zip(names, positional, strict=False)), **named}
    heads, factor = self.num_attention_heads, 1 + len(self.pos_att_type)
    q, k, v = (
        self.transpose_for_scores(project(states), heads)
        for project in (self.query_proj, self.key_proj, self.value_proj)
    )
    relative = self.disentangled_attention_bias(q, k, options["relative_pos"], options["rel_embeddings"], factor)
    batch, length, size = len(states), *q.shape[1:]
    q, k, v = (x.view(batch, heads, length, size) for x in (q, k, v))
    scale = (size * factor) ** 0.5
    scores = q @ k.transpose(2, 3) / scale + relative.view(batch, heads, length, length)
    scores = scores.masked_fill(~mask.bool(), torch.finfo(scores.dtype).min)
    weights = torch.cat([q @ held[0].transpose(1, 2) / scale, scores], -1).softmax(-1)
    output = weights[..., :TOKENS] @ held[1] + weights[..., TOKENS:] @ v
    return output.transpose(1, 2).reshape(batch, length, -1), None


def distilbert_with(columns_of: dict[int, tuple[Tensor, Tensor]], attend: Callable[..., Any]) -> Callable[..., Any]:
    """Eager attention over keys and values that begin with the columns."""

    def function(owner: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        before = [x.expand(len(q), -1, -1, -1) for x in columns_of[id(owner)]]
        mask = None if mask is None else F.pad(mask, (TOKENS, 0))
        return attend(owner, q, torch.cat([before[0], k], 2), torch.cat([before[1], v], 2), mask, **options)

    return function


@torch.no_grad()
def test_a_prefix_on_deberta(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = both("deberta-v2")
    tuned, held = columns(graph)
    modules = [m for m in model.modules() if isinstance(m, modeling_deberta_v2.DisentangledSelfAttention)]
    assert len(modules) == len(held) == 2
    for owner, column in zip(modules, held, strict=True):
        monkeypatch.setattr(owner, "forward", functools.partial(deberta_with, column, owner))
    for padding in (0, 3):
        tokens = right_padded(model, padding)
        ours = module.load(tuned)(*given(tuned, tokens))[0]
        theirs = model(**tokens)[0]
        seen = tokens["attention_mask"].bool()
        torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["features", "sequence-classification"])
@torch.no_grad()
def test_the_first_deberta_has_its_relative_scores_as_a_bias(task: str) -> None:
    config = transformers.DebertaConfig(
        vocab_size=112, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16,
        position_biased_input=False, type_vocab_size=0, pooler_hidden_size=32,
    )  # fmt: skip
    model = build.build(config, "base" if task == "features" else task)
    graph = graphs.graph_over(model, config, task)
    (node,) = nodes(graph)
    assert node.kwargs["dropout_p"] == config.attention_probs_dropout_prob
    assert str(node.args[3].target) == "attention_mask"
    assert node.args[4].meta["val"].shape[1] == 4
    tokens = right_padded(model, 3)
    ours, theirs = module.load(graph)(*given(graph, tokens))[0], model(**tokens)[0]
    seen = tokens["attention_mask"].bool() if task == "features" else slice(None)
    torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-5, rtol=1e-5)


def test_multiple_choice_masks_each_choice() -> None:
    (node,) = nodes(capture_config(families.tiny_config("deberta-v2"), "multiple-choice"))
    assert [len(node.args[place].meta["val"].shape) for place in (0, 3)] == [4, 2]


@pytest.mark.slow
def test_an_encoder_decoder_has_self_and_cross_attention() -> None:
    config = causal_config("mvp")
    config.is_decoder, config.forced_eos_token_id = False, None
    model = build.build(config, "seq2seq-lm")
    graph = graphs.graph_over(model, config, "seq2seq-lm")
    found = {(n.kwargs.get("role"), n.kwargs.get("causal"), str(n.args[3].target)) for n in nodes(graph)}
    assert found == {
        (None, None, "attention_mask"), (None, True, "decoder_attention_mask"), ("cross", None, "attention_mask"),
    }  # fmt: skip
    tokens = right_padded(model, 2)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}
    assert torch.equal(*(one.generate(**tokens, **options) for one in (model, generator(module.load(graph)))))


def right_padded(model: Any, padding: int) -> dict[str, Tensor]:
    tokens = build.tokens(model.config, 2, 8)
    tokens["attention_mask"][0, 8 - padding :] = 0
    return tokens


@torch.no_grad()
def test_a_prefix_on_distilbert(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph = graphs.model_of("distilbert", "features"), graphs.graph_of("distilbert", "features")
    tuned, held = columns(graph)
    modules = [m for m in model.modules() if isinstance(m, modeling_distilbert.DistilBertSelfAttention)]
    by_owner = {id(owner): column for owner, column in zip(modules, held, strict=True)}
    attend = distilbert_with(by_owner, modeling_distilbert.eager_attention_forward)
    monkeypatch.setattr(modeling_distilbert, "eager_attention_forward", attend)
    tokens = right_padded(model, 3)
    ours = module.load(tuned)(*given(tuned, tokens))[0]
    theirs = model(**tokens, position_ids=torch.arange(8).expand(2, -1) + TOKENS)[0]
    seen = tokens["attention_mask"].bool()
    torch.testing.assert_close(ours[seen], theirs[seen], atol=2e-5, rtol=1e-5)


def test_a_refusal_says_why_and_what_works() -> None:
    graph = capture_config(causal_config("prophetnet"), "causal-lm")
    with pytest.raises(UnsupportedError, match="prefix needs an attention node, and prophetnet was") as error:
        run.apply(graph, make("prefix"))
    assert error.value.where.startswith("attention captured as it is, in its own code: prophetnet.decoder.layers.0")
    assert error.value.hint.startswith("methods that work on it: lora, ")
    assert "prefix" not in error.value.hint


@pytest.mark.parametrize("kind", ["autocast", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["mpt", "gptj", "codegen"])
@torch.no_grad()
def test_half_precision_rounds_no_more_than_transformers(name: str, kind: str) -> None:
    model, graph = both(name)
    tokens = build.tokens(model.config, 2, 8, padding=2)
    seen = tokens["attention_mask"].bool()
    inputs = given(graph, tokens)
    positions = {key: x for key, x in zip(graph.inputs, inputs, strict=True) if key == "position_ids"}
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    half = type(model)._from_config(model.config, attn_implementation="eager", dtype=dtype).eval()
    half.load_state_dict(model.state_dict())
    exact = model(**tokens, **positions)[0][seen]
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        theirs = half(**tokens, **positions)[0][seen]
        ours = module.load(graph, dtype=dtype)(*inputs)[0][seen]
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= 2.5 * (theirs - exact).abs().max()
