"""Writing an attention that was read in a model's own code as one `surgeon::attention` node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.graph import val
from surgeon.recognise_masks import Pattern, describe, is_mask
from surgeon.recognise_place import Place, Writer, is_view, shape, source
from surgeon.recognise_scores import CASTS, Attention, Condition, NotRecognised, Term, split_bias
from surgeon.recognise_values import Sizes, Values, constant, expression

aten = torch.ops.aten
_ATTENTION = torch.ops.surgeon.attention.default
_FACTORS = {aten.mul.Tensor: 1, aten.div.Tensor: -1}


@dataclass
class Written:
    """The attention node, its output in the shape of the old one, its operands, and what else both read."""

    node: fx.Node
    output: fx.Node
    operands: tuple[fx.Node, ...]
    leaves: list[fx.Node]


def write(place: Place, attention: Attention) -> Written:
    """The node, not yet read by anything.

    Raises:
        NotRecognised: the node has no way to say it.
    """
    writer = Writer(place.part, attention.output)
    low = val(attention.v).dtype
    k, k_scale = _keys(writer, attention, low)
    q, v = (_heads(writer, _uncast(node, low), attention.heads) for node in (attention.q, attention.v))
    k = _heads(writer, k, attention.heads)
    operands = (writer.old(q), writer.old(k), writer.old(v))
    for node in (k, v):
        if not (shape(node)[1] in (1, attention.heads) and shape(node)[2] == shape(k)[2]):
            raise NotRecognised(f"keys of shape {tuple(val(k).shape)} with values of shape {tuple(val(v).shape)}")
    if shape(k)[1] != shape(v)[1]:
        raise NotRecognised("keys and values have different numbers of heads")
    pattern, terms, conditions = _masks(place, attention)
    bias = _bias(place, writer, attention.heads, terms, conditions)
    q, k = (node if val(node).dtype == low else writer(aten.type_as.default, node, v) for node in (q, k))
    mask = None if pattern.mask is None else place.held(pattern.mask)
    options = {"causal": pattern.causal, "window": pattern.window, "dropout_p": attention.dropout_p}
    kwargs: dict[str, Any] = {
        "scale": attention.scale * k_scale,
        **{name: value for name, value in options.items() if value},
    }
    if shape(q)[2] != shape(k)[2]:
        kwargs["role"] = "cross"
    given = [mask, bias]
    while given and given[-1] is None:
        given.pop()
    node = writer(_ATTENTION, q, k, v, *given, **kwargs)
    flat = val(attention.output).dim() == 3
    output = writer(aten.flatten.using_ints, node, 0, 1) if flat else node
    return Written(
        node, output, operands, [place.held(t.node) for t in terms] + [place.held(c.node) for c in conditions]
    )


def _uncast(node: fx.Node, low: torch.dtype) -> fx.Node:
    """The operand before it was cast up: the attention node adds up in fp32 by itself."""
    while node.target in CASTS and val(node).dtype == torch.float32 and source(node).meta["val"].dtype == low:
        node = source(node)
    return node


def _keys(writer: Writer, attention: Attention, low: torch.dtype) -> tuple[fx.Node, float]:
    """The keys `[.., s, d]`, and the factor they were multiplied with on their way to the product."""
    node, scale = attention.k, 1.0
    if not attention.k_transposed:
        return _uncast(node, low), scale
    while True:
        number = constant(node.args[1]) if node.target in _FACTORS else None
        if number is not None:
            scale *= number ** _FACTORS[node.target]
            node = source(node)
        elif _uncast(node, low) is not node:
            node = _uncast(node, low)
        elif is_view(node) and val(source(node)).dim() > 2 and shape(source(node))[-2:] == shape(node)[-2:]:
            node = source(node)
        else:
            break
    rank = val(node).dim()
    if node.target is aten.transpose.int and {int(axis) % rank for axis in node.args[1:]} == {rank - 2, rank - 1}:
        return _uncast(source(node), low), scale
    if node.target is aten.permute.default:
        axes: Any = node.args[1]
        return writer(aten.permute.default, source(node), [*axes[:-2], axes[-1], axes[-2]]), scale
    return writer(aten.transpose.int, node, -1, -2), scale


def _heads(writer: Writer, node: fx.Node, heads: int) -> fx.Node:
    """`[b · h, t, d]` as `[b, h, t, d]`, as it was before it was flattened if it was."""
    if val(node).dim() == 4:
        return node
    wanted = [expression(val(node).shape[0]) / heads, heads, *shape(node)[1:]]
    before = node
    while is_view(before):
        before = source(before)
        if shape(before) == wanted:
            return before
    return writer(aten.unflatten.int, node, 0, [-1, heads])


def _masks(place: Place, attention: Attention) -> tuple[Pattern, list[Term], list[Condition]]:
    """What is described, and what stays to be added and to be hidden explicitly."""

    def values_of(sizes: Sizes) -> Values:
        return place.values(sizes)

    if attention.causal:
        return Pattern(causal=True), attention.terms, attention.conditions
    terms, conditions = _expanded(place, attention)
    masks = [term for term in terms if is_mask(values_of, term)]
    pattern = describe(place.graph, values_of, conditions, masks, attention.heads)
    if pattern is not None:
        return pattern, [term for term in terms if term not in masks], []
    if attention.gates:
        raise NotRecognised("the scores are multiplied by a tensor")
    return Pattern(), attention.terms, attention.conditions


def _expanded(place: Place, attention: Attention) -> tuple[list[Term], list[Condition]]:
    """Terms taken apart into sums and hidden keys, as far as the trunk that computed them."""
    terms, conditions, queue = list[Term](), list(attention.conditions), list(attention.terms)
    while queue:
        term = queue.pop(0)
        node = place.outer(term.node) or term.node
        if is_mask(place.values, Term(node, term.factor, term.rank)):
            terms.append(Term(node, term.factor, term.rank))
            continue
        part = split_bias(node)
        if part is not None and part[1] is not None:
            conditions.append(Condition(part[1].node, False, term.rank))
            queue.append(Term(part[0], term.factor, term.rank))
        elif part is not None and split_bias(part[0]) is not None:
            queue.append(Term(part[0], term.factor, term.rank))
        elif node.target is aten.add.Tensor and not node.kwargs and _has_mask(place, term, node):
            queue += [Term(arg, term.factor, term.rank) for arg in node.all_input_nodes]
        else:
            terms.append(Term(node, term.factor, term.rank))
    return terms, conditions


def _has_mask(place: Place, term: Term, node: fx.Node) -> bool:
    return len(node.all_input_nodes) == 2 and any(
        is_mask(place.values, Term(arg, term.factor, term.rank)) for arg in node.all_input_nodes
    )


def _bias(
    place: Place, writer: Writer, heads: int, terms: Iterable[Term], conditions: Iterable[Condition]
) -> fx.Node | None:
    """The sum of the terms with the hidden keys at minus infinity; a boolean if there are conditions alone."""
    total: fx.Node | None = None
    for term in terms:
        # What the trunk computes stays there: passes lengthen a bias where it is computed.
        here = writer if term.node.graph is place.part else Writer(term.node.graph, term.node.next)
        node = _four_axes(here, term.node, term.rank, heads)
        node = node if term.factor == 1.0 else here(aten.mul.Tensor, node, term.factor)
        node = place.held(_one_row(place, here, node))
        total = node if total is None else writer(aten.add.Tensor, total, node)
    shown: fx.Node | None = None
    for condition in conditions:
        node = _four_axes(writer, place.held(condition.node), condition.rank, heads)
        if val(node).dtype != torch.bool:
            node = writer(aten.to.dtype, node, torch.bool)
        if not condition.shows:
            node = writer(aten.logical_not.default, node)
        shown = node if shown is None else writer(aten.logical_and.default, shown, node)
    if total is None or shown is None:
        return shown if total is None else total
    hidden = writer(aten.logical_not.default, shown)
    return writer(aten.masked_fill.Scalar, total, hidden, float("-inf"))


def _one_row(place: Place, writer: Writer, node: fx.Node) -> fx.Node:
    """A bias that is one row for all queries, whatever the formula of their number (a slice of a table, in MPT)."""
    rows = val(node).shape[-2]
    if not isinstance(rows, torch.SymInt) or rows.node.expr.is_Symbol:
        return node
    if any(place.values(Sizes(2, length, length)).number(rows) != 1 for length in (1, 2, 7, 40)):
        return node
    return writer(aten.unsqueeze.default, writer(aten.select.int, node, -2, 0), -2)


def _four_axes(writer: Writer, node: fx.Node, rank: int, heads: int) -> fx.Node:
    sizes = shape(node)
    if rank == 3 and len(sizes) == 3 and sizes[0] != 1:
        return _heads(writer, node, heads)
    for _ in range(4 - len(sizes)):
        node = writer(aten.unsqueeze.default, node, 0)
    return node
