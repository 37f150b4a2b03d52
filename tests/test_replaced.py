"""Tensors of the base that train beside an adapter."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.zoo.folders import base_of
from surgeon import passes, run
from surgeon.errors import SurgeonError, UsageError
from surgeon.model import load_model


def test_a_weight_cannot_be_adapted_and_trained_whole() -> None:
    graph = run.apply(base_of("llama")[1], passes.make("lora", rank=4))
    with pytest.raises(UsageError, match="trains whole too"):
        run.apply(
            graph, passes.make("vera", rank=4, targets="o_proj", modules_to_save="model.layers.0.self_attn.q_proj")
        )
    with pytest.raises(SurgeonError, match="no module matches"):
        run.apply(graph, passes.make("lora", rank=4, modules_to_save="nowhere"))
    with pytest.raises(UsageError, match="bias"):
        passes.make("lora", bias="some")


def test_training_a_model_does_not_change_its_graph() -> None:
    _, graph = base_of("bert")
    graph = run.apply(graph, passes.make("lora", targets="query", rank=4, modules_to_save="classifier"))
    before = graph.values["classifier.weight"].clone()
    model = load_model(graph)
    with torch.no_grad():
        model.get_parameter("classifier.weight").zero_()
    assert torch.equal(graph.values["classifier.weight"], before)
    assert torch.equal(model.trained().inserted["classifier.weight"](), torch.zeros_like(before))


def test_options_survive_a_copy() -> None:
    step = passes.make("lora", ranks=[["q_proj", 2]], modules_to_save="classifier", bias="sites")
    assert passes.make("lora", **json.loads(json.dumps(step.options()))) == step
    assert dataclasses.replace(step, rank=3).options()["rank"] == 3
