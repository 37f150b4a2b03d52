"""Captured graphs of the tiny families with their random weights, one capture per family and process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.zoo import build, families
from surgeon.capture import capture_config
from surgeon.graph import Graph
from surgeon.module import load
from surgeon.replaced import Held


def model_of(name: str, task: str | None = None) -> PreTrainedModel:
    """The family's random eager model, in fp32 and eval mode; `task` is the family's own if not given."""
    return _model(name, task or families.task_of(name))


@functools.cache
def _model(name: str, task: str) -> PreTrainedModel:
    return build.build(config_of(name, task), "base" if task == "features" else task)


def config_of(name: str, task: str) -> PretrainedConfig:
    """The family's config; a model that answers questions has two scores per token, whatever its family labels."""
    config = families.tiny_config(name)
    if task == "question-answering":
        config.num_labels = 2
    return config


def graph_of(name: str, task: str | None = None) -> Graph:
    """That model captured, over its weights."""
    return _graph(name, task or families.task_of(name))


@functools.cache
def _graph(name: str, task: str) -> Graph:
    return dataclasses.replace(graph_over(_model(name, task), config_of(name, task), task), source=name)


def graph_over(model: PreTrainedModel, config: PretrainedConfig, task: str) -> Graph:
    """A config captured, over the weights of a model of it."""
    values = {**dict(model.named_buffers()), **{k: v.detach() for k, v in model.state_dict().items()}}
    return dataclasses.replace(capture_config(config, task), values=values)


def inputs_of(graph: Graph, batch: int = 2, length: int = 7, seed: int = 0) -> list[torch.Tensor]:
    """Random token ids without padding, and what goes with them, in the order of the graph's inputs."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, graph.config.get_text_config().vocab_size, (batch, length), generator=generator)
    made = []
    for name in graph.inputs:
        own = ids.flip(1)[:, :-1] if name.startswith("decoder_") else ids
        if name.endswith("input_ids"):
            made.append(own)
        elif name.endswith("attention_mask"):
            made.append(torch.ones_like(own))
        else:
            made.append(torch.arange(length).expand(batch, -1) if name == "position_ids" else torch.zeros_like(own))
    return made


def randomised(graph: Graph, seed: int = 1, std: float = 0.2, names: Iterable[str] | None = None) -> Graph:
    """The graph with random values for what trains: an adapter after training, whatever its method."""
    generator = torch.Generator().manual_seed(seed)
    result = graph.copy()
    for name in graph.trainable() if names is None else names:
        drawn = torch.randn(graph.tensors[name].shape, generator=generator) * std
        result.inserted[name] = Held(graph.inserted[name]().float() + drawn)
    return result


@torch.no_grad()
def outputs_of(graph: Graph, shape: tuple[int, int] = (2, 7), dtype: torch.dtype | None = None) -> torch.Tensor:
    """All outputs of a graph on the tokens of `inputs_of`, flat."""
    return torch.cat([value.flatten() for value in load(graph, dtype=dtype)(*inputs_of(graph, *shape))])


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the rounding of fp32 arithmetic in another order."""
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())
