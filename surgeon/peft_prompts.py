"""PEFT's prompt learning: one tensor `prompt_embeddings` for the whole model, made of all sites' columns or rows.

Prompt tuning: the rows `[p, hidden]`. Prefix tuning: `[p, 2 · layers · heads · size]`, viewed as
`[p, 2 · layers, heads, size]` with the keys of layer i in row 2i and its values in row 2i + 1; keys are not rotated.
Layout: PEFT 0.21, `PeftModel.get_prompt`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from surgeon import lengths
from surgeon.fold import Fold
from surgeon.graph import Graph
from surgeon.normal import Columns
from surgeon.peft_values import check_shape, put
from surgeon.sites import ATTENTION, EMBEDDING, argument_of, has_argument, sites

KEY = "prompt_embeddings"


def in_order(graph: Graph, found: Sequence[Fold]) -> list[Fold]:
    """The sites of an adapter in the order of the model."""
    place = {site.path: number for number, site in enumerate(sites(graph))}
    return sorted(found, key=lambda item: place[item.site.path])


def unfit(graph: Graph, found: Sequence[Fold]) -> str:
    """Why PEFT has no place for the columns or rows of an adapter, or ""."""
    if found[0].step.bias != "none":
        return "its virtual tokens train alone, without biases of the base"
    if found[0].site.kind == EMBEDDING:
        return "" if len(found) == 1 else f"it has rows at one embedding, and these are at {len(found)}"
    columns = [item.columns() for item in found]
    if any(column.column_bias is not None for column in columns):
        return "its columns have no gate"
    if any(tensor.shape != columns[0].k.shape for column in columns for tensor in (column.k, column.v)):
        return "its keys and values have the same size in every layer"
    nodes = _self_attentions(graph)
    hides = any(node.kwargs.get("window") or node.kwargs.get("chunk") for node in nodes.values())
    if hides and not all(column.windowed for column in columns):
        return "a sliding window hides its columns"
    if any(_has_bias(node) for node in nodes.values()) and not getattr(found[0].step, "biased", True):
        return "its position biases see columns as tokens before the text"
    if {item.site.path for item in found} != nodes.keys():
        return "its columns are at every self-attention, of the decoder if there is one"
    return ""


def table(graph: Graph, found: Sequence[Fold]) -> torch.Tensor:
    """`prompt_embeddings` of one adapter that is not `unfit`, in fp32, from all its sites."""
    if found[0].site.kind == EMBEDDING:
        return found[0].rows().float()
    columns = [item.columns() for item in in_order(graph, found)]
    rows = columns[0].k.new_zeros((2 * _layers(graph, len(columns)), *columns[0].k.shape), dtype=torch.float32)
    for number, column in enumerate(columns):
        first = _row(graph, number, len(rows))
        rows[first], rows[first + 1] = column.k.float(), column.v.float()
    return rows.permute(2, 0, 1, 3).flatten(1)


def fill(graph: Graph, found: Sequence[Fold], tensor: torch.Tensor, where: Path) -> None:
    """Put `prompt_embeddings` into a graph that has the adapter, in place.

    Raises:
        UsageError: it has another shape than the sites' columns or rows.
    """
    if found[0].site.kind == EMBEDDING:
        item = found[0]
        wanted = tuple(_blank(graph, item).rows().shape)
        copies = len(tensor) // wanted[0] if len(tensor) % wanted[0] == 0 else 0
        if _twofold(graph) and copies == 2:
            tensor = tensor[: wanted[0]]  # PEFT makes rows for the decoder too, and never reads them.
        check_shape(KEY, tuple(tensor.shape), wanted, where)
        _set(graph, item, tensor, where)
        return
    ordered = in_order(graph, found)
    heads, count, size = _blank(graph, ordered[0]).columns().k.shape
    width = 2 * heads * size
    layers = tensor.shape[-1] // width if _twofold(graph) and tensor.shape[-1] % width == 0 else len(ordered)
    check_shape(KEY, tuple(tensor.shape), (count, layers * width), where)
    rows = tensor.view(count, 2 * layers, heads, size).permute(1, 2, 0, 3)
    for number, item in enumerate(ordered):
        first = _row(graph, number, len(rows))
        _set(graph, item, Columns(rows[first].contiguous(), rows[first + 1].contiguous()), where)


def config(graph: Graph, found: Sequence[Fold]) -> dict[str, Any]:
    """The sizes that PEFT's prompt learning configs have in common."""
    if found[0].site.kind == EMBEDDING:
        count, width = found[0].rows().shape
        text = graph.config.get_text_config()
        return {
            "num_virtual_tokens": count,
            "token_dim": width,
            "num_transformer_submodules": 1,
            "num_attention_heads": getattr(text, "num_attention_heads", None),
            "num_layers": getattr(text, "num_hidden_layers", None),
        }
    heads, count, size = found[0].columns().k.shape
    return {
        "num_virtual_tokens": count,
        "token_dim": heads * size,
        "num_transformer_submodules": 2 if _twofold(graph) else 1,
        "num_attention_heads": heads,
        "num_layers": _layers(graph, len(found)),
    }


def _self_attentions(graph: Graph) -> dict[str, fx.Node]:
    """Path → node of every self-attention, of the decoder if there are two stacks."""
    parts = {path: {node.name: node for node in part.nodes} for path, part in graph.layers.items()}
    parts[""] = {node.name: node for node in graph.trunk.nodes}
    length = lengths.length_of(graph)
    found = {site.path: parts[site.layer][site.node] for site in sites(graph, ATTENTION)}
    return {
        path: node for path, node in found.items() if node.kwargs.get("role") != "cross" and lengths.axes(node, length)
    }


def _blank(graph: Graph, item: Fold) -> Fold:
    """The adapter with shapes in place of values: first values may come from a text whose tokenizer is not at hand."""

    def shape(name: str) -> tuple[int, ...]:
        own = item.site.tensor(item.owner, name)
        return graph.tensors[own if own in graph.tensors else f"{item.owner}.{name}"].shape

    empty = {name: functools.partial(torch.empty, shape(name), device="meta") for name in item.params}
    return dataclasses.replace(item, params=empty)


def _set(graph: Graph, item: Fold, form: Columns | torch.Tensor, where: Path) -> None:
    for name, value in item.step.params(form, item.site).items():
        put(graph, item.site.tensor(item.owner, name), value, KEY, where)


def _has_bias(node: fx.Node) -> bool:
    """Whether an attention adds to its scores by position."""
    return has_argument(node, 4) and argument_of(node, 4).meta["val"].is_floating_point()


def _twofold(graph: Graph) -> bool:
    """Whether PEFT counts two sub-modules: an encoder and a decoder."""
    return "decoder_input_ids" in graph.inputs


def _layers(graph: Graph, count: int) -> int:
    """Layers in PEFT's file: twice as many for a decoder that has an encoder, see `_row`."""
    return 2 * count if _twofold(graph) else count


def _row(graph: Graph, number: int, rows: int) -> int:
    """The row of the keys of the layer `number`; its values are in the next.

    For encoder-decoder models PEFT lays the same rows out twice and deals four of them to each layer, keys and values
    for its self- and cross-attention. It then empties the cache of the cross-attention, so that a prefix reaches the
    decoder's self-attention alone, and layer i reads row 4i modulo all rows. With half as many layers as rows for four
    each, layers share rows; in a file for twice the layers every layer has its own.
    """
    return 4 * number % rows if _twofold(graph) else 2 * number
