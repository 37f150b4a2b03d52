from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, model_of
from surgeon import run, sites
from surgeon.graph import copied, tag
from surgeon.passes import make
from surgeon.sites import ATTENTION, CONV1D, EMBEDDING, EXPERTS, LINEAR, Site


def paths(family: str, *kinds: str) -> list[str]:
    return [site.path for site in sites.sites(graph_of(family), *kinds)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bert", "mixtral"])
def test_every_matrix_of_the_model_is_one_site(family: str) -> None:
    model = model_of(family)
    expected = {
        path: kind
        for path, module in model.named_modules()
        for kind, types in (
            (LINEAR, ("Linear", "MixtralTopKRouter")),
            (CONV1D, ("Conv1D",)),
            (EMBEDDING, ("Embedding", "GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding")),
        )
        if type(module).__name__ in types
    }
    found = {site.path: site.kind for site in sites.sites(graph_of(family), LINEAR, CONV1D, EMBEDDING)}
    assert found == expected
    for site in sites.sites(graph_of(family), LINEAR, CONV1D, EMBEDDING):
        weight = model.get_parameter(site.weight)
        shape = (site.inp, site.out) if site.transposed else (site.out, site.inp)
        assert tuple(weight.shape) == shape
        assert site.transposed == (site.kind in (CONV1D, EMBEDDING))
        bias = getattr(model.get_submodule(site.path), "bias", None)
        assert (site.bias == "") == (bias is None)
        if bias is not None:
            assert model.get_parameter(site.bias) is bias


def test_attentions_have_a_path_and_no_weight() -> None:
    found = sites.sites(graph_of("llama"), ATTENTION)
    assert [site.path for site in found] == [f"model.layers.{i}.self_attn" for i in range(4)]
    assert {(site.weight, site.bias, site.inp, site.out) for site in found} == {("", "", 8, 8)}
    assert {(site.heads, site.queries, site.role) for site in found} == {(2, 4, "decoder")}
    assert [site.layer for site in found] == [f"model.layers.{i}" for i in range(4)]


def test_attentions_have_a_role() -> None:
    roles = [site.role for site in sites.sites(graph_of("bart"), ATTENTION)]
    assert roles == ["encoder"] * 2 + ["decoder", "cross"] * 2
    assert {site.role for site in sites.sites(graph_of("bert"), ATTENTION)} == {"encoder"}


def test_sites_come_in_the_order_of_the_model() -> None:
    found = paths("llama")
    assert found[0] == "model.embed_tokens"
    assert found[-1] == "lm_head"
    layers = [path.split(".")[2] for path in found[1:-1]]
    assert layers == sorted(layers)


def test_a_tied_head_is_a_site_with_the_stored_weight() -> None:
    head = next(site for site in sites.sites(graph_of("qwen3")) if site.path == "lm_head")
    assert head.weight == "model.embed_tokens.weight"
    assert (head.out, head.inp, head.layer) == (112, 32, "")


def test_experts_are_one_site_per_tensor() -> None:
    found = {site.path: site for site in sites.sites(graph_of("gpt_oss"), EXPERTS)}
    site = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert (site.experts, site.out, site.inp, site.transposed) == (4, 96, 32, True)
    assert site.bias == "model.layers.0.mlp.experts.gate_up_proj_bias"
    assert not {site.transposed for site in sites.sites(graph_of("mixtral"), EXPERTS)} - {False}


def test_tensors_have_names_that_collide_with_none() -> None:
    assert Site("a.q_proj", LINEAR, "", "n").tensor("lora", "a") == "a.q_proj.lora.a"
    assert Site("a.experts.down_proj", EXPERTS, "", "n").tensor("lora", "a") == "a.experts.lora.down_proj.a"


def test_what_a_pass_inserts_is_no_site() -> None:
    base = graph_of("llama")
    graph = run.apply(base, make("lora", rank=2, targets="all-linear"))
    assert [(s.path, s.kind, s.weight) for s in sites.sites(graph)] == [
        (s.path, s.kind, s.weight) for s in sites.sites(base)
    ]


def test_the_source_of_what_is_fed_is_what_its_pass_did_not_write() -> None:
    graph = run.apply(graph_of("llama"), make("lora", rank=2, targets="*.q_proj"))
    part, _ = copied(graph.layers["model.layers.0"])
    low = next(node for node in part.nodes if node.target is torch.ops.aten.linear.default and tag(node))
    assert sites.source_of(low) is low.args[0]
    assert tag(sites.source_of(low)) is None
