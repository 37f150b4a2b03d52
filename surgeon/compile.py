"""From an fx graph to a Python function, in a training and an evaluation variant.

Functions take the module that owns the graph's tensors as first argument, so equal layers share them as they share the
graph. The training variant runs fused (see `surgeon.fuse`); the evaluation variant has no dropout and runs the graph
operator by operator, but for bypasses over weights in codes (see `surgeon.coded_bypass`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.coded_bypass import joined
from surgeon.fuse import fused
from surgeon.graph import copied, sweep
from surgeon.mixed import with_casts

aten = torch.ops.aten
_TRAINING = ("dropout_p", "group", "wrap")
"""What an attention does only while it trains: dropout, and shifted sparse segments."""
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.dropout_.default}


@dataclass(frozen=True)
class Code:
    """A graph as functions of (module, *inputs); the mixed ones are for adapters of another dtype than the base's."""

    train: Callable[..., Any]
    evaluate: Callable[..., Any]
    mixed_train: Callable[..., Any]
    mixed_evaluate: Callable[..., Any]

    def choose(self, *, training: bool, mixed: bool, device: str) -> Callable[..., Any]:
        """The function for a module's mode; autocast casts by itself."""
        if mixed and not torch.is_autocast_enabled(device):
            return self.mixed_train if training else self.mixed_evaluate
        return self.train if training else self.evaluate


_codes: weakref.WeakKeyDictionary[fx.Graph, tuple[int, Code]] = weakref.WeakKeyDictionary()


def code(graph: fx.Graph) -> Code:
    """The compiled graph; compiled once per graph object and number of nodes."""
    known = _codes.get(graph)
    if known is None or known[0] != len(graph.nodes):
        quiet = without_dropout(graph)
        train, evaluate = _function(fused(graph)), _function(joined(quiet))
        cast, quiet_cast = with_casts(graph), with_casts(quiet)
        mixed_train = train if cast is graph else _function(cast)
        mixed_evaluate = evaluate if quiet_cast is quiet else _function(quiet_cast)
        known = (len(graph.nodes), Code(train, evaluate, mixed_train, mixed_evaluate))
        _codes[graph] = known
    return known[1]


def without_dropout(graph: fx.Graph) -> fx.Graph:
    """The same graph with every dropout switched off, and whole attention; the graph itself if nothing changes."""
    if not any(_drops(node) for node in graph.nodes):
        return graph
    quiet, _ = copied(graph)
    for node in list(quiet.nodes):
        if node.target is torch.ops.surgeon.attention.default:
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in _TRAINING}
        elif node.target is aten.scaled_dot_product_attention.default and len(node.args) > 4:
            node.args = (*node.args[:4], 0.0, *node.args[5:])
        elif _drops(node):
            node.replace_all_uses_with(node.args[0])
            quiet.erase_node(node)  # the sweep keeps what draws random numbers
    sweep(quiet)
    return quiet


def _drops(node: fx.Node) -> bool:
    if node.target is torch.ops.surgeon.attention.default:
        return any(node.kwargs.get(name) for name in _TRAINING)
    if node.target is aten.scaled_dot_product_attention.default:
        return len(node.args) > 4 and bool(node.args[4])
    return node.target in _DROPOUTS


def _function(graph: fx.Graph) -> Callable[..., Any]:
    python = graph.python_code("self")
    scope: dict[str, Any] = dict(python.globals)
    exec(compile(python.src, "<surgeon graph>", "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function
