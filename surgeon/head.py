"""The language-model head at the end of a trunk, so that the loss can be computed without the logits.

Recognised: logits = cast(cap · tanh(scale · (hidden Wᵀ + b) / cap)), each part optional (Gemma's cap, Cohere's and
Granite's scale). Some rows of W may be replaced by others.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.graph import Graph, copied, sweep

aten = torch.ops.aten


@dataclass(frozen=True)
class Head:
    """How logits follow from the last hidden state.

    Attributes:
        body: the trunk, returning the hidden state `[b, t, h]` in place of the logits.
        weight: full name of W `[vocab, h]`.
        bias: full name of b `[vocab]`, or "".
        scale: factor on the logits before the cap.
        softcap: c in c · tanh(x / c), 0 for none.
        rows: full name of the rows `[n, h]` that replace some of W's, or "".
        index: full name of which ones they replace `[n]`, or "".
    """

    body: fx.Graph
    weight: str
    bias: str
    scale: float
    softcap: float
    rows: str = ""
    index: str = ""

    def logits(self, module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[.., vocab]` of hidden states `[.., h]`, with the head's tensors out of a module of the graph."""
        bias = module.get_parameter(self.bias) if self.bias else None
        scores = torch.nn.functional.linear(hidden, module.get_parameter(self.weight), bias)
        if self.rows:
            index = module.get_buffer(self.index)
            own = None if bias is None else bias[index]
            scores = scores.index_copy(-1, index, torch.nn.functional.linear(hidden, self.own(module), own))
        scores = scores if self.scale == 1.0 else scores * self.scale
        return self.softcap * torch.tanh(scores / self.softcap) if self.softcap else scores

    def own(self, module: torch.nn.Module) -> torch.Tensor:
        """The rows that replace some of W's."""
        return module.get_parameter(self.rows)


_heads: weakref.WeakKeyDictionary[fx.Graph, tuple[int, Head | None]] = weakref.WeakKeyDictionary()


def find_head(graph: Graph) -> Head | None:
    """The head of a graph whose first output is logits, or None where the end of the trunk is anything else."""
    if graph.outputs[:1] != ("logits",):
        return None
    known = _heads.get(graph.trunk)
    if known is None or known[0] != len(graph.trunk.nodes):
        known = (len(graph.trunk.nodes), _find(graph.trunk))
        _heads[graph.trunk] = known
    return known[1]


def _find(trunk: fx.Graph) -> Head | None:
    fresh, _ = copied(trunk)
    output = next(iter(reversed(fresh.nodes)))
    results: Any = output.args[0]
    node, scale, softcap, replaced = results[0], 1.0, 0.0, ("", "")
    while node.target is not aten.linear.default:
        found = _replaced(node)
        if found is not None and replaced == ("", "") and len(node.users) == 1:
            replaced, node = found, node.args[0]
            continue
        step = _unwrap(node, scale, softcap)
        if step is None or len(node.users) > 1:
            return None
        node, scale, softcap = step
    hidden, weight, *rest = node.args
    bias = rest[0] if rest else None
    if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr") or len(node.users) > 1:
        return None
    output.args = ((hidden, *results[1:]),)
    sweep(fresh)
    return Head(fresh, str(weight.target), str(bias.target) if bias is not None else "", scale, softcap, *replaced)


def _replaced(node: fx.Node) -> tuple[str, str] | None:
    """Names of the rows and of their index, where some logits are those of other rows than W's."""
    if node.target is not aten.index_copy.default:
        return None
    scores, axis, index, own = node.args
    if axis != -1 or own.target is not aten.linear.default or scores.target is not aten.linear.default:
        return None
    bias = own.args[2:] == () or own.args[2].args[0] is (*scores.args, None)[2]
    same = own.args[0] is scores.args[0] and bias and len(own.args) == len(scores.args)
    return (str(own.args[1].target), str(index.target)) if same and own.args[1].op == index.op == "get_attr" else None


def _unwrap(node: Any, scale: float, softcap: float) -> tuple[Any, float, float] | None:
    """One elementwise step back from the logits."""
    if node.target in (aten.to.dtype, aten.type_as.default):
        return node.args[0], scale, softcap
    if node.target is aten.tanh.default and softcap:
        inner = node.args[0]
        if inner.target is aten.div.Tensor and inner.args[1] == softcap:
            return inner.args[0], scale, softcap
        return None
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or not isinstance(node.args[1], (int, float)):
        return None
    factor = float(node.args[1])
    if getattr(node.args[0], "target", None) is aten.tanh.default and node.target is aten.mul.Tensor:
        return (node.args[0], scale, factor) if scale == 1.0 else None
    return node.args[0], scale * (factor if node.target is aten.mul.Tensor else 1 / factor), softcap
