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
from surgeon.module import read_tensor
from surgeon.replaced import Held


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


def test_a_trained_tensor_takes_the_dtype_of_its_base() -> None:
    _, graph = base_of("bert")
    values = {name: graph.values[name] for name in graph.tensors}
    values = {name: value.bfloat16() if value.is_floating_point() else value for name, value in values.items()}
    graph = dataclasses.replace(graph, values=values)
    graph = run.apply(graph, passes.make("lora", targets="query", rank=4, modules_to_save="classifier"))
    graph.inserted["classifier.weight"] = Held(torch.full((3, 32), 1 / 3))
    assert load_model(graph, dtype=torch.float32).get_parameter("classifier.weight").dtype is torch.float32
    own = read_tensor(graph, "classifier.weight", None, torch.device("cpu"))
    assert torch.equal(own, torch.full((3, 32), 1 / 3, dtype=torch.bfloat16))


def test_options_survive_a_copy() -> None:
    step = passes.make("lora", ranks=[["q_proj", 2]], modules_to_save="classifier", bias="sites")
    assert passes.make("lora", **json.loads(json.dumps(step.options()))) == step
    assert dataclasses.replace(step, rank=3).options()["rank"] == 3
