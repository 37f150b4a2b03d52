"""Heads as they lie in a row: what GroupQueryAttention reads and writes, without the turns that torch needs.

transformers makes `[b, h, t, d]` of `[b, t, h d]` for attention and turns the result back; the operator's own form is
the row. Where a turn is all that is between, it goes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgeon.graph import val

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int)
_FLAT = (*_VIEWS, aten.flatten.using_ints)
_SAME = (aten.contiguous.default, aten.clone.default, aten.alias.default)


def in_rows(node: fx.Node) -> fx.Node:
    """What `[b, h, t, d]` or `[b, t, h, d]` was made of, `[b, t, h d]`, or new nodes after it that make that."""
    whole = node if is_turned(node) else _turned_from(node)
    if whole is None:
        with node.graph.inserting_after(node):
            whole = node.graph.call_function(aten.transpose.int, (node, 1, 2))
        whole.meta["val"] = val(node).transpose(1, 2)
    source = _bare(whole)
    row: Any = source.args[0] if source.target in _VIEWS else None
    if row is not None and _is_row_of(row, whole):
        found: fx.Node = row
        return found
    with whole.graph.inserting_after(whole):
        row = whole.graph.call_function(aten.flatten.using_ints, (whole, 2))
    row.meta["val"] = val(whole).flatten(2)
    return row


def give_rows(node: fx.Node, row: fx.Node) -> None:
    """Who reads an attention `[b, h, t, d]` reads its row `[b, t, h d]`: as it is, where they make that of it."""
    for user in node.users:
        if _turns(user):
            for reader in _flattened(user, user):
                reader.replace_all_uses_with(row)
    _, heads, _, size = val(node).shape
    with node.graph.inserting_after(row):
        split = node.graph.call_function(aten.unflatten.int, (row, 2, [heads, size]))
    with node.graph.inserting_after(split):
        turned = node.graph.call_function(aten.transpose.int, (split, 1, 2))
    turned.meta = dict(node.meta)
    node.replace_all_uses_with(turned)


def is_turned(node: fx.Node) -> bool:
    """Whether a tensor of heads has them after the tokens, `[b, t, h, d]`: it is the number of tokens that varies."""
    return isinstance(val(node).shape[1], torch.SymInt)


def is_written(node: fx.Node) -> bool:
    """Whether anything is written into a tensor or a view of it in place: where it is made it is not whole."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if schema is None or not user.args or user.args[0] is not node:
            continue
        alias = schema.arguments[0].alias_info
        if alias is not None and (alias.is_write or is_written(user)):
            return True
    return False


def _turned_from(node: fx.Node) -> fx.Node | None:
    node = _bare(node)
    source: Any = node.args[0] if _turns(node) else None
    return source if source is None else _bare(source)


def _bare(node: fx.Node) -> fx.Node:
    inner: Any = node
    while inner.target in _SAME:
        inner = inner.args[0]
    found: fx.Node = inner
    return found


def _turns(node: fx.Node) -> bool:
    axes: Any = node.args[1:]
    return node.target is aten.transpose.int and sorted(axis % 4 for axis in axes) == [1, 2]


def _is_row_of(row: fx.Node, whole: fx.Node) -> bool:
    """Whether `[b, t, n]` and `[b, t, h, d]` are one in the same order."""
    one, four = val(row).shape, val(whole).shape
    return len(one) == 3 and str(one[:2]) == str(four[:2]) and one[2] == four[2] * four[3]


def _flattened(node: fx.Node, whole: fx.Node) -> list[fx.Node]:
    """What makes a row of `[b, t, h, d]`."""
    found: list[fx.Node] = []
    for user in node.users:
        if user.target in _SAME:
            found += _flattened(user, whole)
        elif user.target in _FLAT and _is_row_of(user, whole):
            found.append(user)
    return found
