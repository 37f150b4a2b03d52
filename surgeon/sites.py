"""The places of a graph that passes work on: linears, convolutions, embeddings, experts, attentions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.errors import SurgeonError
from surgeon.graph import Graph, path_of, tag
from surgeon.quantised import HELD

aten = torch.ops.aten
GIVEN = "given"  # node.meta key: (owner, position or keyword, what undoes it) of what passes gave a site's node
LINEAR, CONV1D, EMBEDDING, ATTENTION, EXPERTS = "linear", "conv1d", "embedding", "attention", "experts"
CONV = "conv"
WEIGHTED = (LINEAR, CONV1D, EMBEDDING, EXPERTS, CONV)
"""The kinds that have a weight."""
_CONVOLUTIONS = {overload for op in (aten.conv1d, aten.conv2d, aten.conv3d) for overload in (op.default, op.padding)}


@dataclass(frozen=True)
class Site:
    """One place in one layer.

    Attributes:
        path: full module path (`model.layers.3.self_attn.q_proj`).
        kind: LINEAR (`[out, in]`), CONV1D (Hugging Face's transposed `[in, out]`), EMBEDDING (`[vocab, out]`),
            EXPERTS (the matrices of a layer's experts in one tensor, `[experts, out, in]`), CONV (a convolution's
            kernel, `[out, in / groups, *window]`), ATTENTION.
        layer: path of the layer it lies in, "" for the trunk.
        node: name of the node in that layer's graph.
        weight: full name of the weight it reads, "" for attentions; tied weights by the name they are stored under.
        bias: full name of the bias, or "".
        inp: size of its input; rows of the table for an embedding.
        out: size of its output.
        experts: number of experts, 0 for other kinds.
        used: how many of them a token is sent to; 1 for other kinds.
        heads: K/V heads of an attention, whose `inp` is the size of a key and `out` that of a value.
        queries: query heads of an attention.
        role: of an attention: "decoder" or "encoder" over its own tokens, "cross" over an encoder's states.
        transposed: whether the weight is stored input first.
        batched: whether all experts see all rows, `[experts, n, in]`: one product per expert, and no row is sent.
        groups: of a convolution, in which outputs read their own share of the inputs.
        window: sizes of a convolution's window.
    """

    path: str
    kind: str
    layer: str
    node: str
    weight: str = ""
    bias: str = ""
    inp: int = 0
    out: int = 0
    experts: int = 0
    transposed: bool = False
    heads: int = 0
    queries: int = 0
    role: str = ""
    batched: bool = False
    used: int = 1
    groups: int = 1
    window: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """Path of the module that has the weight; experts are a parameter of theirs."""
        return self.path.rpartition(".")[0] if self.kind == EXPERTS else self.path

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight (or as many rows of it) as it multiplies, `[.., out, in]`.

        Experts and groups of a convolution have an axis in front; a window is part of `in`.
        """
        if self.kind == CONV:
            return weight.flatten(1) if self.groups == 1 else weight.flatten(1).unflatten(0, (self.groups, -1))
        return weight.transpose(-1, -2) if self.transposed else weight

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """The other way: a `matrix` as the weight is stored."""
        if self.kind == CONV:
            return matrix.reshape(-1, self.inp // self.groups, *self.window)
        return matrix.transpose(-1, -2) if self.transposed else matrix

    def tensor(self, owner: str, name: str) -> str:
        """Full name of what a pass inserts here: `<path>.<owner>.<name>`.

        Experts are a parameter and not a module, so theirs stands beside it: `<module>.<owner>.<parameter>.<name>`.
        """
        leaf = self.path.removeprefix(self.module)
        return f"{self.module}.{owner}{leaf}.{name}"


def sites(graph: Graph, *kinds: str) -> list[Site]:
    """Every base-model site of the given kinds (all, if none is given), in the order of the model."""
    found = [site for site in _walk(graph) if not kinds or site.kind in kinds]
    order = {path: position for position, path in enumerate(graph.layers)}
    return sorted(found, key=lambda site: order.get(site.layer, -1 if site.kind == EMBEDDING else len(order)))


def _walk(graph: Graph) -> Iterator[Site]:
    for shared, prefixes in graph.parts():
        nodes = [node for node in shared.nodes if node.op == "call_function" and tag(node) is None]
        for prefix in prefixes:
            for node in nodes:
                site = _site(graph, node, prefix)
                if site is not None:
                    yield site


def _site(graph: Graph, node: fx.Node, prefix: str) -> Site | None:
    layer = prefix.removesuffix(".")
    if node.target is torch.ops.surgeon.attention.default:
        return _attention(graph, node, prefix)
    kind, weight, bias = _weights(node)
    if kind is None or weight is None:
        return None
    name, other = prefix + str(weight.target), "" if bias is None else prefix + str(bias.target)
    if kind == CONV:
        return _convolution(graph, node, prefix, name, other, tuple(weight.meta["val"].shape))
    *experts, out, inp = tuple(weight.meta["val"].shape)
    batched = node.target is aten.bmm.default
    transposed = kind in (CONV1D, EMBEDDING) or batched or bool(node.kwargs.get("transposed"))
    if transposed:
        out, inp = inp, out
    return Site(
        _path(node, name, prefix), kind, layer, node.name, graph.resolve(name), other, inp, out,
        experts[0] if experts else 0, transposed, batched=batched, used=_used(graph, experts, batched),
    )  # fmt: skip


def _used(graph: Graph, experts: list[int], batched: bool) -> int:
    """How many experts a token is sent to, as the config says it."""
    if not experts or batched:
        return experts[0] if experts else 1
    config = graph.config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k", "moe_k")
    return next((int(n) for name in names if isinstance(n := getattr(config, name, None), int) and n > 0), 1)


def _convolution(graph: Graph, node: fx.Node, prefix: str, weight: str, bias: str, shape: tuple[int, ...]) -> Site:
    out, inp, *window = shape
    x = node.args[0]
    groups = int(x.meta["val"].shape[-1 - len(window)]) // inp
    return Site(
        _path(node, weight, prefix), CONV, prefix.removesuffix("."), node.name, graph.resolve(weight), bias,
        inp * groups, out, groups=groups, window=tuple(window),
    )  # fmt: skip


def _attention(graph: Graph, node: fx.Node, prefix: str) -> Site:
    q, k, v = (node.args[position].meta["val"].shape for position in range(3))
    return Site(
        prefix + path_of(node), ATTENTION, prefix.removesuffix("."), node.name, inp=int(k[3]), out=int(v[3]),
        heads=int(k[1]), queries=int(q[1]), role=_role(graph, node),
    )  # fmt: skip


def _role(graph: Graph, node: fx.Node) -> str:
    if node.kwargs.get("role") == "cross":
        return "cross"
    decoder = next((n for n in graph.trunk.nodes if n.op == "placeholder" and n.target == "decoder_input_ids"), None)
    if decoder is None:
        return "decoder" if node.kwargs.get("causal") or graph.task == "causal-lm" else "encoder"
    sizes = (decoder.meta["val"].shape[1], node.meta["val"].shape[2])
    same = len({str(size.node.expr) if isinstance(size, torch.SymInt) else str(size) for size in sizes}) == 1
    return "decoder" if same else "encoder"


def _weights(node: fx.Node) -> tuple[str | None, fx.Node | None, fx.Node | None]:
    """The kind of a node with a weight of its own, that weight (what is remembered of it, if held), and its bias."""
    if HELD in node.meta:
        held: Any = node.meta[HELD]
        return LINEAR if held.function is aten.linear.default else CONV1D, held, node.args[1]
    if node.target is aten.linear.default:
        kind, weight, bias = LINEAR, node.args[1], node.args[2] if len(node.args) > 2 else None
    elif node.target is aten.addmm.default:
        kind, weight, bias = CONV1D, node.args[2], node.args[0]
    elif node.target is aten.embedding.default:
        kind, weight, bias = EMBEDDING, node.args[0], None
    elif node.target is torch.ops.surgeon.expert_linear.default:
        kind, weight, bias = EXPERTS, node.args[1], node.args[3] if len(node.args) > 3 else None
    elif node.target is aten.bmm.default:
        kind, weight, bias = EXPERTS, node.args[1], None
    elif node.target in _CONVOLUTIONS:
        kind, weight, bias = CONV, node.args[1], node.args[2] if len(node.args) > 2 else None
    else:
        return None, None, None
    axes = {EXPERTS: 3, CONV: 5}.get(kind, 2)
    if not _is_tensor_of_model(weight, axes) or not (bias is None or _is_tensor_of_model(bias, axes)):
        return None, None, None
    return kind, weight, bias


def _is_tensor_of_model(node: object, axes: int) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and len(node.meta["val"].shape) <= axes


def input_position(node: fx.Node) -> int:
    """Which argument of a site's node is its input."""
    return 1 if node.target in (aten.addmm.default, aten.embedding.default) else 0


def argument_of(node: fx.Node, position: int) -> fx.Node:
    """An argument of a site's node as the model gives it, below what passes feed the site in its place."""
    found: Any = node.args[position]
    while (mark := tag(found)) and mark.input and mark.site == node.name:
        found = source_of(found)
    return found


def has_argument(node: fx.Node, position: int) -> bool:
    """Whether the model gives a site's node this argument: an optional one that no pass gave it."""
    mine = position < len(node.args) and isinstance(node.args[position], fx.Node)
    return mine and all(key != position for _, key, _ in node.meta.get(GIVEN, ()))


def source_of(fed: fx.Node) -> fx.Node:
    """What a node that stands for a site's input was made from: the first thing its pass did not write there."""
    mark = tag(fed)
    pending = [fed]
    while pending:
        for source in pending.pop().all_input_nodes:
            found = tag(source)
            if found is not None and mark is not None and (found.owner, found.site) == (mark.owner, mark.site):
                if source.op == "call_function":
                    pending.append(source)
            elif source.op != "get_attr" and not (source.op == "placeholder" and found is not None):
                return source
    raise SurgeonError(f"{fed.name} is made from nothing", path_of(fed))


def _path(node: fx.Node, weight: str, prefix: str) -> str:
    """The module's path: that of its weight, or where it was called if the weight is another module's (tied heads)."""
    called, owner = prefix + path_of(node), weight.removesuffix(".weight").removesuffix(".in_proj_weight")
    return owner if owner.startswith(called) or not path_of(node) else called
