"""Floating-point operations of a graph, read off its nodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from surgeon.graph import Graph
from surgeon.sites import ATTENTION, CONV, CONV1D, EXPERTS, LINEAR, sites


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token, 2 per multiply-add of a weight matrix.

    Attributes:
        base: forward pass through the base's linears, convolutions (per position), experts in use and head.
        adapter: forward pass through what the methods add.
        forward: base + adapter.
        training_step: 2 · forward + 2 · trained parameters: the backward pass sends gradients through every matrix
            and forms weight gradients of the trained ones alone.
        attention_per_position: what attention adds per position a token sees, scores and values: 2 · h · (d + d_v).
    """

    base: int
    adapter: int
    forward: int
    training_step: int
    attention_per_position: int


@dataclass(frozen=True)
class TextFlops:
    """Floating-point operations of a forward pass over one text while training, as LongLoRA's Table 11 counts them.

    Every token counts as seeing all positions of its span, those after it too.

    Attributes:
        length: of the text, the model's context in tokens.
        attention: scores and values: Σ 2 · h · (d + d_v) · span · length.
        total: with everything else, methods included.
    """

    length: int
    attention: int
    total: int


def text_flops(graph: Graph, length: int, per_token: int, spans: Mapping[str, int]) -> TextFlops:
    """The work on a text of `length` tokens; `spans` by path of the attention, see `surgeon.passes.base.Cost`."""
    parts = {**graph.layers, "": graph.trunk}
    attention = 0
    for site in sites(graph, ATTENTION):
        node = next(node for node in parts[site.layer].nodes if node.name == site.node)
        limits = (spans.get(site.path, 0), int(node.kwargs.get("window") or 0), int(node.kwargs.get("chunk") or 0))
        span = min([length, *filter(None, limits)])
        attention += _attention_flops(graph, node) * span * length
    return TextFlops(length, attention, attention + per_token * length)


def flops_of(graph: Graph, trained: int, adapter: int) -> Flops:
    """The work of a model with `trained` trained parameters and `adapter` operations per token that methods add."""
    linears = dataclasses.replace(graph, applied=())
    matrices = sites(linears, LINEAR, CONV1D, CONV, EXPERTS)
    base = sum(2 * site.used * site.inp // site.groups * math.prod(site.window) * site.out for site in matrices)
    forward = base + adapter
    return Flops(base, adapter, forward, 2 * forward + 2 * trained, _per_layer(graph, _attention_flops))


def _per_layer(graph: Graph, count: Callable[[Graph, fx.Node], int]) -> int:
    """A number summed over every node, counted once per distinct layer graph."""
    return sum(
        len(prefixes) * count(graph, node)
        for part, prefixes in graph.parts()
        for node in part.nodes
        if node.op == "call_function"
    )


def _attention_flops(graph: Graph, node: fx.Node) -> int:
    if node.target is not torch.ops.surgeon.attention.default:
        return 0
    q, v = node.args[0].meta["val"], node.args[2].meta["val"]
    return 2 * int(q.shape[1]) * (int(q.shape[3]) + int(v.shape[3]))
