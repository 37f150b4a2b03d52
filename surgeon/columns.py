"""Learned keys and values before those of an attention: what its masks, windows and biases have for them, and gates."""

from __future__ import annotations

import torch
from torch import fx

from surgeon import biases, lengths
from surgeon.edit import Edit
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.sites import Site, argument_of, has_argument

aten = torch.ops.aten
FLOOR = 1e-18  # ε of a gate: no sum of exponentials feels it, and its square is a normal number in fp32


def attach(
    edit: Edit,
    tables: tuple[fx.Node, fx.Node],
    *,
    dropout: float,
    hidden: bool,
    biased: bool,
    added: fx.Node | None,
    count: int | fx.Node = 0,
) -> None:
    """k, v → cat(P_k, k), cat(P_v, v); masks and biases let every query see the columns.

    Args:
        edit: at the attention.
        tables: P_k `[h_kv, p, d]` and P_v `[h_kv, p, d_v]`, or with an axis of 1 before.
        dropout: on both, another draw for every row of the batch.
        hidden: whether a window hides them as it hides tokens; chunks are counted from them then.
        biased: whether position biases see them as tokens before the text. ALiBi has no other place for them.
        added: what a gate adds to their scores, `[1, h, 1, p]`.
        count: p where it is a node, of columns that are `hidden`; 0 reads it off the tables.
    """
    count = count or int(tables[0].meta["val"].shape[-2])
    batch = edit.call(aten.sym_size.int, edit.argument(0), 0)
    for position, table in zip((1, 2), tables, strict=True):
        rows = edit.dropout(edit.call(aten.expand.default, table, [batch, -1, -1, -1]), dropout)
        edit.feed(edit.call(aten.cat.default, [rows, edit.argument(position)], 2))
    if edit.has(3):
        seen = edit.call(aten.new_ones.default, edit.argument(3), [batch, count])
        edit.feed(edit.call(aten.cat.default, [seen, edit.argument(3)], 1))
    if isinstance(count, int) and not hidden and (edit.node.kwargs.get("window") or edit.node.kwargs.get("chunk")):
        edit.raise_by("prefix", count)
    if edit.has(4):
        _bias(edit, count, biased, added)
    elif added is not None:
        keys = edit.call(aten.sym_size.int, edit.argument(1), 2)
        rest = edit.call(aten.new_zeros.default, added, [1, edit.site.queries, 1, keys])
        edit.give(4, edit.call(aten.cat.default, [added, rest], -1))


def _bias(edit: Edit, count: int | fx.Node, biased: bool, added: fx.Node | None) -> None:
    bias = edit.argument(4)
    if edit.site.role != "cross" and (biased or biases.is_alibi(bias)):
        if added is not None:
            what = f"{edit.owner}: a position bias that is computed for the columns too cannot hold a gate"
            raise UnsupportedError(what, edit.site.path, "another init, normal for example")
        biases.widen(edit, count)
        return
    edit.feed(edit.call(aten.cat.default, [_unbiased(edit, bias, count, added), bias], -1))


def _unbiased(edit: Edit, bias: fx.Node, count: int | fx.Node, added: fx.Node | None) -> fx.Node:
    """What a bias `[.., t, s]` has for the columns: nothing but a gate's, or that they are seen."""
    value = bias.meta["val"]
    if added is not None and not (value.is_floating_point() and value.shape[1] == added.meta["val"].shape[1]):
        what = f"{edit.owner}: this attention's explicit mask cannot hold a gate"
        raise UnsupportedError(what, edit.site.path, "init=normal, or leave it out with --exclude")
    if value.shape[-1] == 1:
        what = f"{edit.owner}: the attention's bias is one for all keys"
        raise UnsupportedError(what, edit.site.path, "leave this attention out with --exclude")
    fill = aten.zeros_like.default if value.is_floating_point() else aten.ones_like.default
    one = edit.call(fill, edit.call(aten.slice.Tensor, bias, -1, 0, 1))
    wide = edit.call(aten.expand.default, one, [-1] * (value.dim() - 1) + [count])
    return wide if added is None else edit.add(wide, added)


def gate(edit: Edit, gates: fx.Node) -> tuple[fx.Node, fx.Node]:
    """log a and g / a with a = √(g² + ε²), of gates g `[h_kv, p]`: added to scores `[1, h, 1, p]`, factor on values.

    Computed in fp32, because fp16 has no ε. A closed gate learns in fp32 and bf16 alone: in fp16 its columns' share of
    the attention is 0.
    """
    wide = edit.call(aten.to.dtype, gates, torch.float32)
    size = edit.call(aten.sqrt.default, edit.call(aten.add.Tensor, edit.mul(wide, wide), FLOOR**2))
    log, site = edit.call(aten.type_as.default, edit.call(aten.log.default, size), gates), edit.site
    if site.queries != site.heads:
        log = edit.call(aten.repeat_interleave.self_int, log, site.queries // site.heads, 0)
    added = edit.call(aten.view.default, log, [1, site.queries, 1, log.meta["val"].shape[-1]])
    return added, edit.call(aten.type_as.default, edit.call(aten.div.Tensor, wide, size), gates)


def gate_of(gates: torch.Tensor, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a trained gate: `[h, p]`, and the factor `[h_kv, p, 1]`."""
    size = (gates.float() ** 2 + FLOOR**2).sqrt()
    return size.log().repeat_interleave(site.queries // site.heads, 0), (gates.float() / size)[..., None]


def shares_biases(graph: Graph, *, every: bool) -> bool:
    """Whether an attention's position bias is computed for columns too: any (`every`), or ALiBi."""
    nodes = [node for part, _ in graph.parts() for node in lengths.attentions(part)]
    found = [argument_of(n, 4) for n in nodes if n.kwargs.get("role") != "cross" and has_argument(n, 4)]
    return any(every or biases.is_alibi(bias) for bias in found)
