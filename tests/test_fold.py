from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from benchmarks.zoo.build import build
from benchmarks.zoo.graphs import graph_of, graph_over, inputs_of, randomised
from surgeon import fold, run
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.module import load
from surgeon.normal import Base
from surgeon.passes import make


@torch.no_grad()
def outputs(graph: Graph) -> torch.Tensor:
    return load(graph)(*inputs_of(graph))[0]


def assert_merges(trained: Graph, base: Graph) -> Graph:
    merged, expected = fold.fold(trained), outputs(trained)
    assert (outputs(merged) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (expected - outputs(base)).abs().max() > 1e-3
    return merged


def test_folds_come_in_the_order_of_the_passes() -> None:
    graph = run.apply(graph_of("llama"), make("vera", rank=2), make("lora", rank=2), make("vera", rank=3))
    found = fold.folds(graph)
    assert [item.owner for item in found] == ["vera"] * 8 + ["lora"] * 8 + ["vera_2"] * 8
    assert set(found[0].params) == {"A", "B", "d", "b"}
    assert set(found[8].params) == {"a", "b"}
    assert found[0].site.path == "model.layers.0.self_attn.q_proj"


def test_a_stack_of_three_merges() -> None:
    base = graph_of("llama")
    steps = (
        make("lora", rank=2),
        make("vera", rank=3, targets="all-linear"),
        make("lora", rank=4, targets="*.up_proj *.q_proj"),
    )
    merged = assert_merges(randomised(run.apply(base, *steps)), base)
    assert merged.text() == base.text()


@pytest.mark.parametrize("targets", ["lm_head", "embed_tokens", "lm_head embed_tokens"])
def test_tied_embeddings_are_untied_by_name(targets: str) -> None:
    base = graph_of("qwen3")
    assert base.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    trained = randomised(run.apply(base, make("lora", rank=3, targets=targets)))
    merged = assert_merges(trained, base)
    assert merged.ties == {}
    assert merged.tensors["lm_head.weight"].shape == (112, 32)
    stored = base.values["model.embed_tokens.weight"]
    for name in ("lm_head", "embed_tokens"):
        full = "lm_head.weight" if name == "lm_head" else "model.embed_tokens.weight"
        assert torch.equal(merged.values[full], stored) != (name in targets)
    model = load(merged)
    assert model.get_parameter("lm_head.weight") is not model.get_parameter("model.embed_tokens.weight")


def test_an_untouched_tie_stays() -> None:
    base = graph_of("qwen3")
    merged = assert_merges(randomised(run.apply(base, make("lora", rank=3))), base)
    assert merged.ties == base.ties


def test_embeddings_merge() -> None:
    base = graph_of("gpt2")
    trained = randomised(run.apply(base, make("lora", rank=3, targets="wpe")))
    merged = assert_merges(trained, base)
    p = {name.rpartition(".")[2]: trained.inserted[name]() for name in trained.trainable()}
    expected = base.values["transformer.wpe.weight"] + ((p["b"] @ p["a"]) * (16 / 3)).T
    assert torch.equal(merged.values["transformer.wpe.weight"], expected)


def test_conv1d_merges_transposed() -> None:
    base = graph_of("gpt2")
    trained = randomised(run.apply(base, make("lora", rank=3, targets="*.c_proj")))
    merged = assert_merges(trained, base)
    item = fold.folds(trained)[0]
    expected = base.values[item.site.weight] + item.normal(Base(lambda: torch.empty(0))).delta().T  # type: ignore[union-attr]
    assert torch.equal(merged.values[item.site.weight], expected)


def test_a_layer_called_again_and_again_merges_once() -> None:
    config = transformers.AlbertConfig(
        vocab_size=112, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64,
    )  # fmt: skip
    base = graph_over(build(config, "sequence-classification"), config, "sequence-classification")
    for step in (make("lora", rank=3, targets="*.query *.ffn"), make("vera", rank=3, targets="*.query *.ffn")):
        trained = randomised(run.apply(base, step), std=1.0)
        merged = assert_merges(trained, base)
        assert merged.text() == base.text()


def test_weights_are_rounded_once_to_their_dtype() -> None:
    base = graph_of("llama")
    half = {name: t.bfloat16() if t.is_floating_point() else t for name, t in base.values.items()}
    trained = randomised(run.apply(dataclasses.replace(base, values=half), make("lora", rank=3)))
    merged = fold.fold(trained)
    item = fold.folds(trained)[0]
    p, name = item.tensors(), item.site.weight
    assert torch.equal(merged.values[name], (half[name].float() + (p["b"] @ p["a"]) * (16 / 3)).bfloat16())
    assert merged.values["lm_head.weight"] is half["lm_head.weight"]


def test_values_are_a_mapping_of_the_same_names() -> None:
    base = graph_of("llama")
    merged = fold.fold(run.apply(base, make("lora", rank=3)))
    assert set(merged.values) == set(base.values)
    assert len(merged.values) == len(base.values)
    assert "lm_head.weight" in merged.values
    assert "no.such" not in merged.values
    with pytest.raises(KeyError):
        merged.values["no.such"]


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(UsageError, match="no adapter to merge") as caught:
        fold.fold(graph_of("llama"))
    assert "surgeon apply" in caught.value.hint


def test_a_second_reader_without_a_name_of_its_own_is_refused() -> None:
    trained = run.apply(graph_of("qwen3"), make("lora", rank=3, targets="lm_head"))
    (item,) = fold.folds(trained)
    assert list(fold.by_weight(trained, [item])) == ["lm_head.weight"]
    nameless = dataclasses.replace(item, site=dataclasses.replace(item.site, path="model.scores"))
    with pytest.raises(
        UnsupportedError, match=r"model.scores reads a weight that \['lm_head', 'model.embed_tokens'\] share"
    ):
        fold.by_weight(trained, [nameless])


def test_one_pass_of_two_is_taken_out() -> None:
    base = graph_of("llama")
    both = run.apply(base, make("lora", rank=3), make("vera", rank=3))
    assert fold.without(both, {"vera"}).text() == run.apply(base, make("lora", rank=3)).text()
    assert fold.without(both, {"lora", "vera"}).text() == base.text()
    assert fold.without(both, set()).text() == both.text()
    assert all(not name.startswith("vera") for name in fold.without(both, {"vera"}).inserted)
