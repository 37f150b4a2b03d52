"""A base in bf16 with adapters in fp32, outside autocast: what PEFT computes, and gradients in fp32."""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks.zoo import build, families
from surgeon import mixed, passes, run
from surgeon.capture import capture_config
from surgeon.graph import Graph
from surgeon.model import SurgeonModel, load_model


@functools.cache
def adapted(name: str) -> Graph:
    config = families.tiny_config(name)
    base = build.build(config)
    graph = capture_config(config)
    graph.values = {**base.state_dict(), **dict(base.named_buffers())}
    steps = passes.make("lora", rank=4, targets="all-linear"), passes.make("vera", rank=8, targets="all-linear")
    graph = run.apply(graph, *steps)
    torch.manual_seed(1)
    for name, spec in graph.trainable().items():
        value = torch.randn(spec.shape) * 0.1
        graph.inserted[name] = functools.partial(torch.clone, value)
    return graph


def in_bf16(name: str) -> SurgeonModel:
    return load_model(adapted(name), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_adapters_stay_in_fp32_and_the_result_is_close(name: str) -> None:
    whole, model = load_model(adapted(name)), in_bf16(name)
    ids = build.tokens(whole.config, 2, 9)["input_ids"]
    expected, found = whole(input_ids=ids).logits, model(input_ids=ids).logits
    assert model._mixed
    assert not whole._mixed
    assert found.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_training_reaches_every_adapter_in_fp32() -> None:
    model = in_bf16("llama").train()
    ids = build.tokens(model.config, 2, 9)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32


def test_autocast_casts_by_itself() -> None:
    model = in_bf16("llama")
    ids = build.tokens(model.config, 2, 9)["input_ids"]
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(input_ids=ids).logits
    assert (inside - model(input_ids=ids).logits).abs().max() <= 0.05 * inside.abs().max()


def test_generation_in_bf16() -> None:
    model = in_bf16("llama")
    ids = build.tokens(model.config, 1, 5)["input_ids"]
    made = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 8)


def test_a_graph_without_tensors_of_its_own_is_left_alone() -> None:
    graph = run.without_values(adapted("llama"))
    base = next(part for part, _ in capture_config(graph.config).groups())
    assert mixed.with_casts(base) is base
