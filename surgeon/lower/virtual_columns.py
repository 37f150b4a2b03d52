"""Rows before the tokens as the keys and values they come to: a prompt becomes a prefix.

Tokens are computed from those before them alone, so what a layer makes of the rows of a prompt never changes: run once,
its keys and values are constants. A model with a K/V cache then needs no case for its first call, and the cache holds
the text alone, as every runtime expects. What is measured: 2e-7 of the logits.
"""

from __future__ import annotations

from typing import Any

import torch

from surgeon import fold, run
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.normal import Columns
from surgeon.passes import make
from surgeon.passes.base import Adapter
from surgeon.replaced import Held
from surgeon.sites import ATTENTION, EMBEDDING, sites
from surgeon.stream import StreamingExecutor
from surgeon.strip import without

_BY_LENGTH = ("dynamic", "longrope")


def as_columns(graph: Graph) -> Graph:
    """The graph of a causal language model with columns in place of rows.

    Raises:
        UnsupportedError: the rows' keys and values are not constants in this model.
    """
    found = fold.rows(graph)
    if not found:
        return graph
    _check(graph)
    count = len(found[0].rows())
    values = _keys_and_values(graph, count)
    plain = without(graph, {found[0].owner})
    result = run.apply(plain, make("prefix", tokens=count, init="zeros", biased=True))
    owner = next(reversed(run.owners(result.applied)))
    added = [item for item in fold.columns(result) if item.owner == owner]
    place = {site.path: number for number, site in enumerate(sites(graph, ATTENTION))}
    added.sort(key=lambda item: place[item.site.path])
    if len(added) != len(values):
        what = f"{len(added)} attentions have keys of their own and {len(values)} are cached"
        raise _refused(graph, what)
    for item, (k, v) in zip(added, values, strict=True):
        for name, value in item.step.params(Columns(k, v), item.site).items():
            result.inserted[item.site.tensor(owner, name)] = Held(value)
    return result


def _keys_and_values(graph: Graph, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`[h_kv, count, d]` of every attention, in the order of the model: those of the rows, in a text of one token."""
    cached = run.apply(graph, make("kv_cache", phase="prefill"))
    token = torch.zeros(1, 1, dtype=torch.long)
    given = [torch.ones_like(token) if name == "attention_mask" else token for name in cached.inputs]
    results = dict(zip(cached.outputs, StreamingExecutor(cached)(*given), strict=True))
    layers = sum(name.startswith("present.") and name.endswith(".key") for name in results)
    return [
        (results[f"present.{i}.key"][0, :, :count].clone(), results[f"present.{i}.value"][0, :, :count].clone())
        for i in range(layers)
    ]


def _check(graph: Graph) -> None:
    rope: Any = getattr(graph.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if by_length := kinds & set(_BY_LENGTH):
        raise _refused(graph, f"the rotary embedding ({by_length.pop()}) of its rows depends on the length of the text")


def _refused(graph: Graph, why: str) -> UnsupportedError:
    steps = [step.name for step in graph.applied if isinstance(step, Adapter) and EMBEDDING in step.kinds]
    what = f"{', '.join(steps)} has no constant keys and values in {graph.config.model_type}: {why}"
    return UnsupportedError(what, graph.source, "train a prefix instead, or bake the rows: surgeon merge --bake-prompt")
