"""Prefix tuning: its formula in NumPy, its options, what it costs, what it refuses, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx
from transformers import CONFIG_MAPPING, AttentionInterface, DynamicCache

from benchmarks.zoo.build import build
from benchmarks.zoo.causal import causal_config
from benchmarks.zoo.graphs import graph_of, graph_over, inputs_of, model_of, outputs_of, randomised
from surgeon import fold, positions, run
from surgeon.capture import capture_config
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.finalise import finalise
from surgeon.generate import generator
from surgeon.graph import Graph
from surgeon.model import load_model
from surgeon.module import load
from surgeon.normal import Columns
from surgeon.passes import make
from surgeon.passes.prefix import Prefix
from surgeon.sites import ATTENTION, sites

TOKENS = 4
_columns: dict[int, Columns] = {}


def prefixed(family: str, **options: Any) -> Graph:
    return run.apply(graph_of(family), make("prefix", tokens=TOKENS, **options))


@torch.no_grad()
def logits_of(graph: Graph, inputs: list[torch.Tensor] | None = None) -> torch.Tensor:
    result: torch.Tensor = load(graph)(*(inputs or inputs_of(graph)))[0]
    return result


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 2e-5) -> None:
    assert (found - expected).abs().max() <= relative * expected.abs().max()


def formula(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **others: Any) -> Any:
    """softmax(q [P_k; k]ᵀ + column bias) [P_v; v]: every query sees the columns, and of the tokens those before it."""
    c, group = _columns[module.layer_idx], query.shape[1] // key.shape[1]
    q, k, v, pk, pv = (x.double().numpy() for x in (query, key, value, c.k, c.v))
    k, v = (
        np.concatenate([np.broadcast_to(p, (len(x), *p.shape)), x], 2).repeat(group, 1) for p, x in ((pk, k), (pv, v))
    )
    s = q @ k.swapaxes(-1, -2) * scaling
    s[..., :TOKENS] += 0 if c.column_bias is None else c.column_bias.double().numpy()[:, None]
    apart = np.arange(q.shape[2])[:, None] + TOKENS - np.arange(s.shape[-1])
    window = others.get("sliding_window") or s.shape[-1] + 1
    seen = (apart >= 0) & ((apart < window) | (not c.windowed and np.arange(s.shape[-1]) < TOKENS))
    w = np.exp(s - s.max(-1, keepdims=True)) * seen
    out = torch.from_numpy((w / w.sum(-1, keepdims=True)) @ v).to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("prefix_in_numpy", formula)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("gpt2", {"hidden": 6}),
        ("llama", {"init": "gated"}),
        ("mistral", {}),
        ("mistral", {"windowed": False}),
    ],
    ids=["grouped", "mlp", "gate", "window", "no-window"],
)
@torch.no_grad()
def test_it_is_the_formula_in_numpy(family: str, options: dict[str, Any]) -> None:
    graph = randomised(prefixed(family, **options))
    _columns.update(enumerate(item.columns() for item in fold.columns(graph)))
    hidden = options.get("windowed", "init" not in options)
    assert {column.windowed for column in _columns.values()} == {hidden}
    model = copy.deepcopy(model_of(family))
    model.config._attn_implementation = "prefix_in_numpy"
    ids, _, numbers = inputs_of(graph)
    moved = numbers if "gated" in options.values() else numbers + TOKENS
    assert_close(logits_of(graph), model(ids, position_ids=moved).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart", "gemma2", "llama4_text", "gpt_oss", "bert"])
def test_behind_a_closed_gate_it_is_the_base_and_learns(family: str) -> None:
    base, graph = graph_of(family), prefixed(family, init="gated")
    assert_close(logits_of(graph), logits_of(base), 1e-6)
    model = load(graph).train()
    model(*inputs_of(graph))[0].square().sum().backward()
    gates = [name for name in graph.trainable() if name.endswith(".gate")]
    assert len(gates) == len(sites(base, ATTENTION))
    assert all(bool(model.get_parameter(name).grad.abs().max() > 1e-6) for name in gates)
    assert fold.without(graph, {"prefix"}).text() == base.text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_are_computed_in_any_dtype(dtype: torch.dtype) -> None:
    base, graph = graph_of("llama"), prefixed("llama", init="gated")
    for one, other in ((graph, base), (randomised(graph), randomised(graph))):
        found, expected = outputs_of(one, dtype=dtype).float(), outputs_of(other)
        assert (found - expected).abs().max() <= 20 * torch.finfo(dtype).eps * expected.abs().max()


def test_the_gradient_of_a_closed_gate_is_that_of_the_numerator() -> None:
    graph = prefixed("llama", init="gated")
    name = next(name for name in graph.trainable() if name.endswith(".gate"))
    model = load_model(graph)
    ids, mask, _ = inputs_of(graph)

    def loss() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask).logits.square().mean()

    gate = model.get_parameter(name)
    loss().backward()
    assert gate.grad is not None
    measured = []
    for step in (1e-3, -1e-3):  # the two sides differ by the denominator, which does not know the gate's sign
        with torch.no_grad():
            gate[0, 0] = step
            measured.append(float(loss()))
    assert abs((measured[0] - measured[1]) / 2e-3 - float(gate.grad[0, 0])) <= 2e-2 * abs(float(gate.grad[0, 0]))


@pytest.mark.parametrize("options", [{}, {"hidden": 16}, {"init": "gated"}], ids=["columns", "mlp", "gate"])
def test_it_learns(options: dict[str, Any]) -> None:
    model = load_model(prefixed("llama", **options)).train()
    ids = inputs_of(model.graph)[0]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.75 * losses[0]


class Words:
    """A tokenizer that knows one text."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [5, 17, 29, 40][: len(text.split())]}


@pytest.mark.parametrize("hidden", [0, 12])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_from_a_text_it_is_that_text(family: str, hidden: int) -> None:
    base = graph_of(family)
    step = make("prefix", tokens=TOKENS, hidden=hidden, init="text:these are four words")
    graph = run.apply(base, step, tokenizer=Words())
    ids, *_ = inputs_of(base)
    whole = torch.cat([torch.tensor([[5, 17, 29, 40]] * 2), ids], 1)
    places = torch.arange(whole.shape[1]).expand(2, -1)
    assert_close(logits_of(graph), logits_of(base, [whole, torch.ones_like(whole), places])[:, TOKENS:])


def test_a_text_is_repeated_to_the_number_of_columns() -> None:
    graph = run.apply(graph_of("bart"), make("prefix", tokens=5, init="text:two words"), tokenizer=Words())
    cross = next(item for item in fold.columns(graph) if item.site.role == "cross")
    assert cross.columns().k.shape == (4, 5, 8)
    k = cross.columns().k
    gated = run.apply(graph_of("bart"), make("prefix", tokens=5, init="gated:text:two words"), tokenizer=Words())
    assert torch.equal(gated.inserted[cross.site.tensor("prefix", "k")](), k)


def test_encoder_decoders_have_a_prefix_per_kind_of_attention() -> None:
    graph = prefixed("bart", hidden=6)
    tables = {name for name in graph.trainable() if name.endswith("_table")}
    assert tables == {f"prefix.{role}_table" for role in ("encoder", "decoder", "cross")}
    for role in ("encoder", "decoder", "cross"):
        one = prefixed("bart", sites=role)
        assert {item.site.role for item in fold.columns(one)} == {role}
        moved = [node for node in one.trunk.nodes if positions.SHIFT in node.meta]
        assert len(moved) == (role == "decoder")
    assert {item.site.role for item in fold.columns(prefixed("llama", sites="decoder"))} == {"decoder"}


def test_targets_choose_attentions() -> None:
    graph = prefixed("llama", targets="*.layers.[02].*", exclude="*.layers.2.*")
    assert [item.site.path for item in fold.columns(graph)] == ["model.layers.0.self_attn"]
    assert len(graph.groups()) == 2


def test_dropout_drops_columns_while_it_trains() -> None:
    model = load(prefixed("llama", dropout=0.5))
    inputs = inputs_of(model.graph)
    torch.manual_seed(0)
    with torch.no_grad():
        quiet, again = model(*inputs)[0], model(*inputs)[0]
        noisy = model.train()(*inputs)[0]
    assert torch.equal(quiet, again)
    assert not torch.equal(quiet, noisy)


def test_what_its_mlp_makes_is_what_stays() -> None:
    graph = randomised(prefixed("bart", hidden=6, dropout=0.1))
    final = finalise(graph)
    assert {name.rpartition(".")[2] for name in final.inserted} == {"k", "v"}
    assert_close(logits_of(final), logits_of(graph), 1e-6)


def test_it_trains_with_checkpointed_layers() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_model(randomised(prefixed("t5", hidden=6))).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        given = dict(zip(model.graph.inputs, inputs_of(model.graph), strict=True))
        model(**given, labels=given["decoder_input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-4)


CACHED = {
    "bart-every-attention": ("bart", ({"hidden": 6},)),
    "gate": ("llama", ({"init": "gated"},)),
    "chunks": ("llama4_text", ({},)),
    "no-window": ("gemma2", ({"windowed": False},)),
    "two": ("gpt2", ({}, {})),
    "sinks": ("gpt_oss", ({},)),
    "biases": ("t5", ({},)),
    "shared-keys": ("gemma3n_text", ({},)),
}


@pytest.mark.parametrize(("family", "steps"), CACHED.values(), ids=CACHED)
def test_generating_with_a_cache_changes_nothing(family: str, steps: tuple[dict[str, Any], ...]) -> None:
    graph = graph_of(family)
    for number, options in enumerate(steps):
        graph = run.apply(graph, make("prefix", tokens=TOKENS + number, **options))
    model = load_model(randomised(graph))
    ids = torch.randint(3, 112, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    options = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids * mask, **options)
    assert generator(model).has_cache
    assert torch.equal(found, model.generate(ids * mask, **options, use_cache=False))


def test_a_cache_has_no_columns_in_it() -> None:
    plain, cached = (run.apply(g, make("kv_cache")) for g in (graph_of("llama"), prefixed("llama")))
    assert cached.inputs == plain.inputs
    assert cached.outputs == plain.outputs
    results = dict(
        zip(cached.outputs, load(cached)(*inputs_of(prefixed("llama")), *[torch.zeros(2, 2, 0, 8)] * 8), strict=True)
    )
    assert results["present.0.key"].shape == (2, 2, 7, 8)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no-columns": ({"tokens": 0}, "tokens is 0"),
    "negative-mlp": ({"hidden": -1}, "hidden is -1"),
    "all-dropped": ({"dropout": 1.0}, "dropout is 1.0"),
    "no-kind": ({"sites": " "}, "sites is ' '"),
    "unknown-kind": ({"sites": "decoder,middle"}, "sites is 'decoder,middle'"),
    "unknown-init": ({"init": "gatedly"}, "init is 'gatedly'"),
}


@pytest.mark.parametrize(("options", "what"), REFUSED.values(), ids=REFUSED)
def test_options_are_checked(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        make("prefix", **options)
    assert caught.value.where.startswith("--")
    assert caught.value.hint


def refusal(graph: Graph, **options: Any) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        run.apply(graph, make("prefix", **options))
    assert all((caught.value.what, caught.value.where, caught.value.hint))
    return caught.value


def test_it_leaves_room_for_text() -> None:
    error = refusal(graph_of("gpt2"), tokens=64)
    assert "64 virtual tokens leave no position for text" in error.what
    assert "gpt2 has 64 positions" in error.where
    assert "no position" in refusal(prefixed("gpt2"), tokens=60).what
    model = load_model(prefixed("gpt2"))
    assert model(input_ids=torch.ones(1, 60, dtype=torch.long)).logits.shape[1] == 60
    with pytest.raises(UsageError, match="position 60 is beyond the 60 that 4 virtual tokens leave") as caught:
        model(input_ids=torch.ones(1, 61, dtype=torch.long))
    assert caught.value.where == "a text of 61 tokens"
    with pytest.raises(UsageError, match="position 63 is beyond") as caught:
        model(input_ids=torch.ones(1, 2, dtype=torch.long), position_ids=torch.tensor([[62, 63]]))
    assert caught.value.where == "position_ids, for 2 tokens"


def test_what_it_cannot_be_put_into_is_refused() -> None:
    base = graph_of("llama")
    assert "has its cache already" in refusal(run.apply(base, make("kv_cache"))).what
    assert "behind a gate stand alone" in refusal(prefixed("llama"), init="gated").what
    assert "behind a gate stand alone" in refusal(prefixed("llama", init="gated")).what
    assert "a window would hide some columns" in refusal(prefixed("gemma2"), windowed=False).what
    assert "layers share the position biases" in refusal(graph_of("t5"), biased=True, targets="*.block.0.*").what
    assert "no site to work on" in refusal(base, sites="cross").what


def test_a_model_without_an_attention_node_is_refused() -> None:
    base = graph_of("llama")
    empty = fx.Graph()
    inputs = [empty.node_copy(node) for node in base.trunk.nodes if node.op == "placeholder"]
    empty.output((inputs[0],))
    error = refusal(dataclasses.replace(base, trunk=empty, layers={}))
    assert isinstance(error, UnsupportedError)
    assert "prefix needs an attention node" in error.what


def test_a_text_needs_a_tokenizer_when_it_is_read() -> None:
    graph = run.apply(graph_of("llama"), make("prefix", init="text:a word"))
    with pytest.raises(UsageError, match="no tokenizer") as caught:
        load(graph)
    assert caught.value.where == "--init text:a word"
    silent = run.apply(graph_of("llama"), make("prefix", init="text:"), tokenizer=Words())
    with pytest.raises(UsageError, match="no tokens"):
        load(silent)


def test_a_gate_is_had_back_from_its_columns() -> None:
    graph = randomised(prefixed("llama", init="gated"))
    for item in fold.columns(graph):
        columns = item.columns()
        assert columns.column_bias is not None
        assert columns.column_bias.shape == (4, TOKENS)
        again = item.step.columns(item.step.params(columns, item.site), item.site)
        assert again.column_bias is not None
        torch.testing.assert_close(again.v, columns.v)
        torch.testing.assert_close(again.column_bias, columns.column_bias)


def test_it_can_be_subclassed() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Prefix):
        tokens: int = 2

    graph = run.apply(graph_of("llama"), Other())
    assert fold.columns(graph)[0].columns().k.shape == (2, 2, 8)


def test_alibi_is_widened_for_every_layer_or_not_at_all() -> None:
    base = capture_config(causal_config("bloom"), "causal-lm")
    assert "layers share the position biases" in refusal(base, tokens=3, targets="*.h.0.*").what
    assert len(run.apply(base, make("prefix", tokens=3)).trainable()) == 2 * len(base.layers)


@torch.no_grad()
def test_layers_whose_heads_differ_have_columns_of_their_own_size() -> None:
    """Gemma 4's global layers have wider heads; its own cache takes keys of each layer's size before the text."""
    fields = {k: v for k, v in causal_config("gemma4_text").to_dict().items() if k != "per_layer_config"}
    config = CONFIG_MAPPING["gemma4_text"](**fields, global_head_dim=24)
    model = build(config)
    base = graph_over(model, config, "causal-lm")
    graph = randomised(run.apply(base, make("prefix", tokens=TOKENS, hidden=6)))
    made = [item.columns() for item in fold.columns(graph)]
    assert [tuple(columns.k.shape) for columns in made] == [(2, TOKENS, 16)] * 3 + [(2, TOKENS, 24)]
    cache = DynamicCache()
    for layer, columns in enumerate(made):
        cache.update(columns.k[None].expand(2, -1, -1, -1), columns.v[None].expand(2, -1, -1, -1), layer)
    ids = inputs_of(graph)[0]
    mask = torch.ones(ids.shape[0], TOKENS + ids.shape[1], dtype=torch.long)
    assert_close(logits_of(graph), model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
