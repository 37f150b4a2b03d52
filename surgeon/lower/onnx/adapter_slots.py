"""An adapter of any method as values of an export's slots: the slots' back end of the normal form."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from surgeon import biases, fold, replaced
from surgeon.checkpoint import Checkpoint
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.finalise import finalise
from surgeon.fold import Fold, value_of
from surgeon.graph import Graph
from surgeon.lower.onnx import whole
from surgeon.lower.onnx.adapter_file import INITIAL, SLOTS
from surgeon.lower.onnx.slots import CROSS, IN, KEY, OUT, SHIFT, VALUE, A, B, places
from surgeon.lower.virtual_columns import as_columns
from surgeon.normal import Columns, Normal, compose
from surgeon.passes.base import Adapter
from surgeon.passes.quantiser import Quantiser
from surgeon.run import owners
from surgeon.sites import ATTENTION, Site, argument_of, has_argument, sites
from surgeon.strip import without

_MERGE = "surgeon export --adapters merge folds it in"
Tensors = dict[str, torch.Tensor]


def base_of(graph: Graph) -> Graph:
    """The graph without its adapters, its codes kept.

    Raises:
        UnsupportedError: an adapter has a tensor that the base has not, or has changed the base's codes.
    """
    _check_codes(graph)
    steps = owners(graph.applied)
    result = without(graph, {owner for owner, step in steps.items() if not isinstance(step, Quantiser)})
    for name in _trained(graph):
        if name not in graph.values:
            raise UnsupportedError(f"{name} was trained, and the base has none", graph.source, _MERGE)
        result.inserted.pop(name, None)
        result.tensors[name] = dataclasses.replace(result.tensors[name], trainable=False)
    return result


def _check_codes(graph: Graph) -> None:
    moved = [step.name for step in graph.applied if getattr(step, "recodes", False)]
    if moved:
        what = f"{moved[0]} changed the codes of the base, which adapters in slots share"
        raise UnsupportedError(what, graph.source, _MERGE)


def described(graph: Graph) -> dict[str, Any]:
    """What an export's manifest says of the base that its adapters must have been made for."""
    try:
        fingerprint = Checkpoint.open(graph.source).fingerprint()
    except SurgeonError:
        fingerprint = ""  # a model that lies in memory
    codes = [step.spec() for step in graph.applied if isinstance(step, Quantiser)]
    found = {
        "model_type": graph.config.model_type, "task": graph.task, "fingerprint": fingerprint, "codes": codes,
        "context": graph.context,
    }  # fmt: skip
    return {**found, "head": whole.digest(graph, graph.fresh)} if graph.fresh else found


def check_base(graph: Graph, record: Mapping[str, Any], where: str) -> None:
    """Raise UsageError for an adapter that was made for another base than an export's."""
    mine, wanted = described(graph), record["base"]
    for key in dict.fromkeys((*mine, *wanted)):
        if (value := mine.get(key)) != wanted.get(key):
            said = "another checkpoint (fingerprint)" if key == "fingerprint" else f"{key} {value or 'none'}"
            said = "a new head of other classes or another seed (its sha256)" if key == "head" else said
            what = f"the adapter was made for another base: {said}, and the export has {wanted.get(key) or 'none'}"
            raise UsageError(what, where, "name the export of its own base with --for, or its base with --base")


def compiled(graph: Graph, record: Mapping[str, Any], where: str = "") -> Tensors:
    """The values of an export's slots that compute what the adapters of a graph do.

    Args:
        graph: the export's base with adapters, with values.
        record: the export's manifest.
        where: what errors call the adapter.

    Raises:
        UnsupportedError: a part of the adapter has no slot; all of them are named, and nothing is left out.
        UsageError: the adapter was made for another base.
    """
    check_base(graph, record, where)
    _check_codes(graph)
    trained = _trained(graph)
    plain = _with_columns(finalise(graph, lambda kept: kept), where)
    found: dict[str, list[Fold]] = {}
    for item in fold.folds(plain):
        found.setdefault(item.site.path, []).append(item)
    linears = {site.path: site for site in sites(plain) if f"{site.path}.{A}" in record[SLOTS]["inputs"]}
    heads = {name: site for name, site in whole.linears(plain).items() if name in trained and site.path in linears}
    _check_slots(plain, [*found], [name for name in trained if name not in heads], linears, where)
    tensors: Tensors = {}
    for path, site in linears.items():
        if path in found or site.bias in trained or site.weight in heads:
            below = [whole.factors(whole.change(plain, site))] if site.weight in heads else []
            tensors.update(_linear(plain, site, found.get(path, []), below))
    tensors.update(_prefix(plain, record, where))
    if not tensors:
        raise UsageError("there is no adapter: it changes nothing of the base", where, "name an adapter's folder")
    dtype = getattr(torch, record[SLOTS]["dtype"])
    return {name: value.detach().to(dtype).contiguous() for name, value in tensors.items()}


def _with_columns(graph: Graph, where: str) -> Graph:
    rows = fold.rows(graph)
    if rows and graph.task != "causal-lm":
        what = f"{rows[0].step.name} has no constant keys and values in {graph.config.model_type}, and so no slot: "
        both = "an encoder's virtual tokens see the text, and a decoder's are computed from it"
        what += both if "decoder_input_ids" in graph.inputs else "its virtual tokens run together with the text"
        raise UnsupportedError(what, where, f"train a prefix instead, or {_MERGE}")
    return as_columns(graph)


def _trained(graph: Graph) -> Tensors:
    """Name → value of the tensors of the base that trained with the adapters."""
    names: dict[str, None] = {}
    for owner, step in owners(graph.applied).items():
        if isinstance(step, Adapter):
            names.update(dict.fromkeys(replaced.names(graph, owner, step)))
    return {name: graph.inserted[name]() for name in names if name in graph.inserted}


def _check_slots(graph: Graph, paths: list[str], trained: list[str], linears: Mapping[str, Site], where: str) -> None:
    """Raise UnsupportedError that names every part of the adapters that has no slot."""
    known = {site.bias for site in linears.values() if site.bias}
    kinds = {site.path: site.kind for site in sites(graph)}
    lost = [f"{path} ({kinds[path]})" for path in paths if path not in linears]
    lost += [name for name in trained if name not in known]
    lost += [f"{item.site.path} ({item.step.name})" for item in fold.rest(graph) if item.site.kind != ATTENTION]
    steps = owners(graph.applied).values()
    lost += [s.name for s in steps if not isinstance(s, (Adapter, Quantiser)) and not s.training_only]
    if lost:
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        what = f"the export has no slot for these parts of the adapter: {', '.join(lost[:4])}{more}"
        raise UnsupportedError(what, where, f"export with slots there (--targets), or {_MERGE}")


def _linear(graph: Graph, site: Site, items: list[Fold], below: list[Normal]) -> Tensors:
    bias = value_of(graph, site.bias).float() if site.bias else None
    made = below + fold.normals(items, lambda: site.matrix(value_of(graph, site.weight).float()), lambda: bias)
    normal = functools.reduce(lambda inner, outer: compose(outer, inner), made).factored() if made else Normal()
    if normal.replaced is not None:
        raise UnsupportedError("rows of the weight are replaced, and there is no slot for rows", site.path, _MERGE)
    found = _factors(normal)
    values = {
        A: found[0],
        B: found[1],
        IN: normal.u,
        OUT: normal.s,
        SHIFT: _shift(normal, bias, graph.values[site.bias].float() if site.bias else None),
    }
    return {f"{site.path}.{leaf}": value for leaf, value in values.items() if value is not None}


def _factors(normal: Normal) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A `[in, r]` and B `[r, out]`, with the scale."""
    if normal.a is None or normal.b is None:
        return None, None
    a = normal.a.float().repeat_interleave(normal.group, -1) if normal.group > 1 else normal.a.float()
    return a.t(), (normal.b.float() * (normal.scale / normal.divisor)).t()


def _shift(normal: Normal, bias: torch.Tensor | None, base: torch.Tensor | None) -> torch.Tensor | None:
    """What the scaled output is short of the adapter's bias b': b' - s ⊙ b, of the base's bias b.

    The adapter's is that of its normal form, or `bias`, which may have trained with it.
    """
    if bias is None or base is None:
        return None
    wanted = bias if normal.bias is None else normal.bias.float()
    found = wanted - (base if normal.s is None else normal.s.float() * base)
    return found if bool((found != 0).any()) else None


def _prefix(graph: Graph, record: Mapping[str, Any], where: str) -> Tensors:
    """The columns of every attention, under the names of slots or of what the cache starts with."""
    found: dict[tuple[str, str], list[tuple[Fold, Columns]]] = {}
    for item in fold.columns(graph):
        found.setdefault((item.site.layer, item.site.node), []).append((item, item.columns()))
    if not found:
        return {}
    kind, known = record[SLOTS]["prefix"], places(graph)
    if kind == "none":
        what = "the export has no slot for these parts of the adapter: keys and values before the text"
        raise UnsupportedError(what, where, _MERGE)
    stem = "prefix." if kind == "slots" else f"{INITIAL}past_key_values."
    tensors: Tensors = {}
    for role in dict.fromkeys(site.role for site in sites(graph, ATTENTION)):
        chosen = {(s.layer, s.node): s.path for s in sites(graph, ATTENTION) if s.role == role}
        left = [path for place, path in chosen.items() if place not in found]
        if 0 < len(left) < len(chosen):
            raise UnsupportedError("the adapter has no keys and values at some attentions", left[0], _MERGE)
        made = {} if left else {f"{stem}{known[place]}": _columns(graph, found[place]) for place in chosen}
        if len({k.shape[2] for k, _ in made.values()}) > 1:
            raise UnsupportedError("the adapter has more keys at some attentions than at others", where, _MERGE)
        tensors |= {f"{name}.{KEY}": k for name, (k, _) in made.items()}
        tensors |= {f"{name}.{VALUE}": v for name, (_, v) in made.items()}
    return tensors


def _columns(graph: Graph, items: list[tuple[Fold, Columns]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[1, h_kv, p, d]` of one attention."""
    for item, columns in items:
        _check_columns(graph, item, columns)
    k, v = (torch.cat([getattr(columns, word).float() for _, columns in items], 1)[None] for word in ("k", "v"))
    return k, v


def _check_columns(graph: Graph, item: Fold, columns: Columns) -> None:
    """Raise UnsupportedError for columns that are seen otherwise than tokens before the text are."""
    part = graph.layers[item.site.layer] if item.site.layer else graph.trunk
    node = next(node for node in part.nodes if node.name == item.site.node)
    if columns.column_bias is not None:
        raise UnsupportedError(f"{item.step.name} has gates, and there is no slot for them", item.site.path, _MERGE)
    if not columns.windowed and (node.kwargs.get("window") or node.kwargs.get("chunk")):
        what = f"{item.step.name} is seen through a window (windowed=False), and slots are not"
        raise UnsupportedError(what, item.site.path, _MERGE)
    given: Any = argument_of(node, 4) if has_argument(node, 4) else None
    numeric = given is not None and given.meta["val"].is_floating_point() and given.meta["val"].shape[-2] != 1
    wanted = given is not None and not biases.sees_text(given)
    if numeric and getattr(item.step, "biased", True) != wanted and item.site.role != CROSS:
        what = "has no position biases, and slots have" if wanted else "has position biases, and slots have none"
        raise UnsupportedError(f"{item.step.name} {what}", item.site.path, _MERGE)
