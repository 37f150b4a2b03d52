"""Between Hugging Face's caches and a graph's inputs and outputs of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from surgeon.errors import UsageError
from surgeon.module import GraphModule
from surgeon.wiring import inputs_of


class TextCache(DynamicCache):
    """Keys and values that may begin with those of virtual tokens, which nobody outside counts."""

    def __init__(self, virtual: int = 0) -> None:
        super().__init__()
        self.virtual = virtual

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of the text's tokens."""
        return max(0, super().get_seq_length(layer_idx) - self.virtual)


def read(runner: GraphModule, caches: dict[str, DynamicCache], batch: int) -> dict[str, torch.Tensor]:
    """The cache's keys and values under the names of the graph's inputs; empty ones where there are none yet."""
    given = {}
    for name, node in zip(runner.graph.inputs, inputs_of(runner.graph.trunk), strict=True):
        if name.startswith("past_key_values."):
            layers, number, word = _slot(name, caches)
            if number < len(layers) and layers[number].is_initialized:
                given[name] = layers[number].keys if word == "key" else layers[number].values
            else:
                _, heads, _, size = node.meta["val"].shape
                shape = (batch, heads, 0, size)
                given[name] = torch.empty(shape, dtype=runner.model_dtype, device=runner.model_device)
    return given


def write(results: dict[str, torch.Tensor], caches: dict[str, DynamicCache]) -> None:
    """The graph's outputs become the cache; what a graph does not return (the encoder's in a step) stays."""
    for name, keys in results.items():
        if name.startswith("present.") and name.endswith(".key"):
            layers, number, _ = _slot(name, caches)
            while len(layers) <= number:
                layers.append(DynamicLayer())
            values = results[name.removesuffix("key") + "value"]
            if not layers[number].is_initialized:
                layers[number].lazy_initialization(keys, values)
            layers[number].keys, layers[number].values = keys, values


def _slot(name: str, caches: dict[str, DynamicCache]) -> tuple[list[Any], int, str]:
    """(layers of the cache, index, "key" or "value") of an input or output of the graph."""
    _, number, *kind, word = name.split(".")
    layers = caches["".join(f"{part}." for part in kind)].layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        raise UsageError(
            "this cache drops tokens or has a fixed size", "past_key_values", "an empty DynamicCache(), without config"
        )
    return layers, int(number), word
