"""The pass that gives attentions their segments: where, when, and that nothing of it is left afterwards."""

from __future__ import annotations

import pytest
import torch

from benchmarks.zoo.causal import causal_config
from benchmarks.zoo.graphs import graph_of, inputs_of, outputs_of, randomised
from surgeon import fold, run
from surgeon.capture import capture_config
from surgeon.errors import SurgeonError, UsageError
from surgeon.finalise import finalise
from surgeon.graph import Graph, copied
from surgeon.module import load
from surgeon.passes import make
from surgeon.strip import without

NAME = "shifted_sparse_attention"


def groups(graph: Graph) -> dict[str, int]:
    """Path of every attention → its group."""
    return {
        f"{prefix}{node.name}": int(node.kwargs.get("group", 0))
        for part, prefixes in graph.parts()
        for prefix in prefixes
        for node in part.nodes
        if node.target is torch.ops.surgeon.attention.default
    }


def trained(graph: Graph, length: int) -> torch.Tensor:
    module = load(graph).train()
    return torch.cat([value.flatten() for value in module(*inputs_of(graph, 2, length))])


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma2", "gpt_neox", "mistral", "olmo2", "mixtral", "t5", "bert"]
)
def test_segments_while_training_and_whole_attention_otherwise(family: str) -> None:
    graph = graph_of(family)
    sparse = run.apply(graph, make(NAME, group=4))
    assert torch.equal(outputs_of(sparse, (2, 11)), outputs_of(graph, (2, 11)))
    torch.manual_seed(0)
    found = trained(sparse, 11)
    torch.manual_seed(0)
    whole = trained(graph, 11)
    assert found.isfinite().all()
    assert not torch.allclose(found, whole)
    assert {*groups(sparse).values()} <= {0, 4}


def test_the_attention_that_trains_is_the_one_of_the_definition() -> None:
    """One layer of a Llama with its attention replaced by masked attention, written with the mask of the definition."""
    graph = run.apply(graph_of("llama"), make(NAME, group=4))
    reference = graph_of("llama").copy()

    def masked(q, k, v, *rest, **options):  # type: ignore[no-untyped-def]
        length, heads = q.shape[2], q.shape[1]
        i = torch.arange(length)
        allowed = torch.stack([
            (i[:, None] >= i[None]) & ((i[:, None] + shift) // 4 == (i[None] + shift) // 4)
            for shift in (0, 2)
            for _ in range(heads // 2)
        ])  # fmt: skip
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed[None], scale=options["scale"])

    reference.layers = dict.fromkeys(reference.layers, copied(next(iter(reference.layers.values())))[0])
    for part in {*reference.layers.values()}:
        for node in part.nodes:
            if node.target is torch.ops.surgeon.attention.default:
                node.target = masked
                node.args = node.args[:3]
                node.kwargs = {"scale": node.kwargs["scale"]}
    torch.testing.assert_close(trained(graph, 13), trained(reference, 13), atol=1e-5, rtol=1e-5)


def test_a_quarter_of_the_context_by_default() -> None:
    graph = graph_of("llama")
    reach = graph.config.max_position_embeddings
    assert {*groups(run.apply(graph, make(NAME))).values()} == {reach // 4}


def test_cross_attention_and_chunks_are_left_as_they_are() -> None:
    roles = [
        (node.kwargs.get("role"), bool(node.kwargs.get("group")))
        for part, _ in run.apply(graph_of("t5"), make(NAME, group=4)).parts()
        for node in part.nodes
        if node.target is torch.ops.surgeon.attention.default
    ]
    assert ("cross", False) in roles
    assert ("cross", True) not in roles
    chunked = run.apply(graph_of("llama4_text"), make(NAME, group=4))
    found = [
        (bool(node.kwargs.get("chunk")), bool(node.kwargs.get("group")))
        for part, _ in chunked.parts()
        for node in part.nodes
        if node.target is torch.ops.surgeon.attention.default
    ]
    assert {*found} == {(True, False), (False, True)}


def test_with_a_prefix_and_lora_and_taken_out_again() -> None:
    steps = [make("lora", rank=2), make(NAME, group=4), make("prefix", tokens=3)]
    graph = randomised(run.apply(graph_of("llama"), *steps))
    assert trained(graph, 11).isfinite().all()
    plain = randomised(run.apply(graph_of("llama"), steps[0], steps[2]))
    plain.inserted.update(graph.inserted)
    torch.testing.assert_close(outputs_of(graph, (2, 11)), outputs_of(plain, (2, 11)))
    left = without(graph, {NAME})
    assert {*groups(left).values()} == {0}
    assert left.text() == plain.text()
    assert fold.folds(graph)


def test_nothing_of_it_is_deployed() -> None:
    graph = run.apply(graph_of("llama"), make("lora", rank=2), make(NAME, group=4), make("prefix", tokens=3))
    final = finalise(randomised(graph))
    assert [step.name for step in final.applied] == ["prefix"]
    assert {*groups(final).values()} == {0}


def test_gradients_reach_the_adapter() -> None:
    graph = randomised(run.apply(graph_of("llama"), make("lora", rank=2), make(NAME, group=4)))
    module = load(graph).train()
    module(*inputs_of(graph, 2, 11))[0].square().mean().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found.values())


@pytest.mark.parametrize("group", [-4, 1])
def test_groups_that_are_none(group: int) -> None:
    with pytest.raises(UsageError, match=f"group is {group}"):
        make(NAME, group=group)


def test_refusals() -> None:
    graph = graph_of("llama")
    with pytest.raises(UsageError, match="already applied"):
        run.apply(graph, make(NAME, group=4), make(NAME, group=4))
    with pytest.raises(SurgeonError, match="needs an attention node, and prophetnet was captured without"):
        run.apply(capture_config(causal_config("prophetnet"), "causal-lm"), make(NAME, group=4))
    with pytest.raises(UsageError, match="quarter"):
        run.apply(graph_of("t5"), make(NAME))
