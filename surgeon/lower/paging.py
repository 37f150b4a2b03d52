"""A graph made to run over pages: every attention keeps its keys and values in a cache of its own (`cached_attention`).

    attention(q, cat(P_k, k), cat(P_v, v), mask)  →  cached_attention(q, k, v, pages …)

The batch has no padding (its rows are segments of requests), so key masks go; learned columns fill the first pages of
every request; and the head computes the logits of the last token alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from surgeon import lengths, numbering, wiring
from surgeon.artifact import operators
from surgeon.artifact.program import Attention, Program
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph, copied, path_of, sweep, val
from surgeon.head import find_head
from surgeon.lower.bypasses import fuse_bypasses

aten, surgeon = torch.ops.aten, torch.ops.surgeon
assert operators  # registers cached_attention
HINT = "--target onnx or --target hf has a form for it"
_KEPT = ("scale", "window", "softcap")
_LEFT = ("dropout_p", "role", "group", "wrap", "prefix", "causal", "chunk", *_KEPT)
INPUTS = ("segments", "slots")


def paged(graph: Graph) -> Program:
    """The program of a causal language model in its final form, with or without an adapter.

    Raises:
        UnsupportedError: tokens of this model meet anywhere but in attentions over keys and values, or an attention
            has a bias, a chunk or later tokens to see.
    """
    _check(graph)
    result, found = graph.copy(), dict[str, list[Attention]]()
    result.trunk = copied(graph.trunk)[0]
    _rewrite(result.trunk, [""], found)
    for shared, paths in result.groups():
        part = copied(shared)[0]
        if _rewrite(part, paths, found):
            for path in paths:
                call = wiring.call_of(result.trunk, path)
                call.args = (*call.args, *(_input(result.trunk, name) for name in INPUTS))
        result.layers.update(dict.fromkeys(paths, part))
    fuse_bypasses(result)
    _last_token(result)
    wiring.prune(result)
    result.tensors = result.resident()
    left = set(result.inputs) - {"input_ids", "position_ids", *INPUTS}
    if left or "input_ids" not in result.inputs:
        what = f"{graph.config.model_type} computes with {', '.join(sorted(left))} outside of its attentions"
        raise UnsupportedError(what, graph.source, HINT)
    order = [node.target for node in result.trunk.nodes if node.op == "call_module"]
    attentions = [one for path in ["", *order] for one in found.get(str(path), [])]
    columns = [name for one in attentions for name in (*one.k, *one.v)]
    result.tensors.update({name: graph.tensors[name] for name in columns})  # the cache reads them, not the graph
    return Program(result, tuple(attentions), numbering.first(graph))


def _check(graph: Graph) -> None:
    name = graph.config.model_type
    if graph.task != "causal-lm":
        raise UnsupportedError(f"the Triton artifact is for causal language models, not for {graph.task}", name, HINT)
    place = lengths.mixing(graph)
    if place:
        what = f"{name} carries state from token to token that is no key or value"
        raise UnsupportedError(what, place, HINT)
    length = lengths.length_of(graph)
    counted = [n for part, _ in graph.parts() for n in lengths.positions(part, length)]
    if counted:
        raise UnsupportedError(f"{name} counts its tokens in the graph", path_of(counted[0]) or counted[0].name, HINT)


def _input(part: fx.Graph, name: str) -> fx.Node:
    known = next((node for node in wiring.inputs_of(part) if node.target == name), None)
    return known if known is not None else wiring.add_input(part, name)


def _rewrite(part: fx.Graph, paths: list[str], found: dict[str, list[Attention]]) -> bool:
    """Rewrite the attentions of a part; whether it has any."""
    nodes = [node for node in part.nodes if node.target is surgeon.attention.default]
    for number, node in enumerate(nodes):
        described = _attend(part, node, f"cache_{number}")
        for path in paths:
            own = f"{path}." if path else ""
            k, v = (tuple(own + name for name in names) for names in (described.k, described.v))
            found.setdefault(path, []).append(dataclasses.replace(described, layer=path, k=k, v=v))
    sweep(part)
    return bool(nodes)


def _attend(part: fx.Graph, node: fx.Node, name: str) -> Attention:
    """The node as `cached_attention`; what its cache holds."""
    _check_attention(node)
    q, options, sinks = node.args[0], node.kwargs, _given(node, 5)
    (k, first), (v, columns) = (_without_columns(node.args[i]) for i in (1, 2))
    segments, slots = (_input(part, one) for one in INPUTS)
    with part.inserting_before(node):
        held = [part.get_attr(f"{name}.{leaf}") for leaf in ("k_pages", "v_pages", "blocks")]
        prefixes = part.get_attr(f"{name}.prefixes") if first else None
        kept: dict[str, Any] = {key: options[key] for key in _KEPT if key in options}
        kept["windowed"] = not options.get("prefix")
        made = part.call_function(
            surgeon.cached_attention.default, (q, k, v, *held, prefixes, segments, slots, sinks), kept
        )
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    part.erase_node(node)
    return Attention(
        "", name, int(val(q).shape[1]), int(val(k).shape[1]), int(val(k).shape[3]), int(val(v).shape[3]),
        tuple(first), tuple(columns),
    )  # fmt: skip


def _check_attention(node: fx.Node) -> None:
    options, where = node.kwargs, path_of(node) or node.name
    if not options.get("causal") or options.get("role", "self") != "self" or _given(node, 4):
        raise UnsupportedError("an attention has a bias of its own, or sees later tokens", where, HINT)
    if options.get("chunk"):
        raise UnsupportedError("attention in chunks has no kernel over pages", where, HINT)
    unknown = set(options) - set(_LEFT)
    if unknown:
        raise UnsupportedError(f"an attention has {', '.join(sorted(unknown))}", where, HINT)


def _given(node: fx.Node, position: int) -> Any:
    """An argument of an attention, whoever gave it, None for none."""
    return node.args[position] if position < len(node.args) else None


def _without_columns(node: fx.Node) -> tuple[fx.Node, list[str]]:
    """Keys or values of the tokens, and the names of the learned columns before them, the first first."""
    names = []
    while node.target is aten.cat.default and node.args[1:] == (2,):
        front, node_after = node.args[0]
        table = front.args[0] if front.target is aten.expand.default else None
        if not isinstance(table, fx.Node) or table.op != "get_attr":
            raise UnsupportedError("learned columns are computed, not stored", path_of(node) or node.name, HINT)
        names.append(str(table.target))
        node = node_after
    return node, names


def _last_token(graph: Graph) -> None:
    """Everything above the head's product is for the last token of each row."""
    if find_head(graph) is None:
        return
    output = wiring.output_of(graph.trunk)
    node: Any = output.args[0][0]
    while node.target is not aten.linear.default:
        node = node.args[0]
    hidden = node.args[0]
    with graph.trunk.inserting_before(node):
        last = graph.trunk.call_function(aten.slice.Tensor, (hidden, 1, -1, 2**63 - 1))
    last.meta = dict(hidden.meta)
    node.replace_input_with(hidden, last)
