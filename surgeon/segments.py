"""Shifted sparse attention (Chen et al. 2024, LongLoRA, §3.2): each half of the heads attends within segments.

Query i sees key j where both lie in one segment and the model's own pattern lets it. The first half of the heads has
segments of G tokens from token 0; those of the second half are shifted by G/2, so that information passes from one
segment to the next in the following layer. Time and memory grow linearly with the text: every segment is an attention
of its own, and nothing of size `[t, t]` exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    torch.Tensor,
]
"""Attention (q, k, v, mask, bias, sinks) of the model, in which the queries are the last keys."""
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def segmented(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    group: int,
    wrap: bool,
    prefix: int,
    attend: Attend,
) -> torch.Tensor:
    """`attend` within segments; the arguments are those of `surgeon.ops.attention`.

    Tokens count from the first that is not padding, so left padding moves no boundary.

    Args:
        q: queries `[b, h, t, d]`.
        k: keys `[b, h_kv, prefix + t, d]`.
        v: values `[b, h_kv, prefix + t, d_v]`.
        mask: key padding `[b, prefix + t]`.
        bias: broadcastable to `[b, h, t, prefix + t]`.
        sinks: `[h]`.
        group: G, tokens of a segment.
        wrap: the paper's form: the last ⌊G/2⌋ and the first ⌈G/2⌉ tokens share a segment of the shifted heads, in which
            the first see the last. Without it they are two segments, and no token sees a later one.
        prefix: first keys, which every query sees.
        attend: attention inside one segment.

    Returns:
        `[b, h, t, d_v]`.
    """
    bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
    order = None if mask is None else _from_first_token(mask, prefix)
    if order is not None and mask is not None:
        q, bias = _at(q, order - prefix, 2), None if bias is None else _moved(bias, order, prefix)
        (k, v), mask = (_moved_keys(x, order, prefix) for x in (k, v)), _moved_mask(mask, order, prefix)
    halves = []
    for half, heads in enumerate(_halves(q.shape[1])):
        own_k, own_v = (_heads_of(x, heads, q.shape[1]) for x in (k, v))
        own_bias = bias if bias is None or bias.shape[1] == 1 else bias[:, heads]
        own = (q[:, heads], own_k, own_v, mask, own_bias, None if sinks is None else sinks[heads])
        shift = group // 2 if half else 0
        halves.append(_rolled(own, group, shift, prefix, attend) if wrap else _cut(own, group, shift, prefix, attend))
    result = torch.cat(halves, 1)
    return result if order is None else _at(result, (order - prefix).argsort(-1), 2)


def boundaries(length: int, group: int, shift: int) -> list[int]:
    """Where the segments of a text begin, and its end: ⌊(i + shift) / G⌋ changes there."""
    return [0, *range(group - shift, length, group), length] if length > group - shift else [0, length]


def _cut(parts: Parts, group: int, shift: int, prefix: int, attend: Attend) -> torch.Tensor:
    """Whole segments as one batch; the first and the last where they are shorter."""
    cuts = boundaries(parts[0].shape[2], group, shift)
    whole = [i for i in range(len(cuts) - 1) if cuts[i + 1] - cuts[i] == group]
    results: list[torch.Tensor] = []
    if not whole or whole[0] > 0:
        results.append(attend(*_piece(parts, cuts[0], cuts[1], 1, prefix)))
    if whole:
        begin, end = cuts[whole[0]], cuts[whole[-1] + 1]
        found = attend(*_piece(parts, begin, end, len(whole), prefix))
        results.append(_unfolded(found, len(whole)))
    if cuts[-1] > sum(x.shape[2] for x in results):
        results.append(attend(*_piece(parts, cuts[-2], cuts[-1], 1, prefix)))
    return torch.cat(results, 2)


def _rolled(parts: Parts, group: int, shift: int, prefix: int, attend: Attend) -> torch.Tensor:
    """The text turned to the first boundary, cut, and turned back; the last piece may be short."""
    if not shift:
        return _cut(parts, group, 0, prefix, attend)
    q, k, v, mask, bias, sinks = parts
    first = group - shift
    turned = torch.arange(q.shape[2], device=q.device).roll(-first)
    order = turned.expand(q.shape[0], -1) + prefix
    bias = None if bias is None else _moved(bias, order, prefix)
    mask = None if mask is None else _moved_mask(mask, order, prefix)
    k, v = (_moved_keys(x, order, prefix) for x in (k, v))
    return _cut((q[:, :, turned], k, v, mask, bias, sinks), group, 0, prefix, attend).roll(first, 2)


def _piece(parts: Parts, begin: int, end: int, count: int, prefix: int) -> Parts:
    """Tokens begin..end as `count` segments in the batch, each with the prefix before its keys."""
    q, k, v, mask, bias, sinks = parts
    cut = slice(begin, end)
    keys = [_with_prefix(x, cut, count, prefix) for x in (k, v)]
    if mask is not None:
        mask = _with_prefix(mask[:, None, :, None], cut, count, prefix)[:, 0, :, 0]
    if bias is not None:
        bias = torch.cat([_bias(bias, begin + i, begin + i + step, prefix) for i, step in _steps(end - begin, count)])
    return (_folded(q[:, :, cut], count), keys[0], keys[1], mask, _in_batch(bias, q.shape[0], count), sinks)


def _steps(length: int, count: int) -> Iterator[tuple[int, int]]:
    return ((i * (length // count), length // count) for i in range(count))


def _bias(bias: torch.Tensor, begin: int, end: int, prefix: int) -> torch.Tensor:
    """`[count = 1, b | 1, h | 1, n | 1, prefix + n | 1]`, a block of it."""
    rows = bias if bias.shape[-2] == 1 else bias[..., begin:end, :]
    if rows.shape[-1] > 1:
        rows = torch.cat([rows[..., :prefix], rows[..., prefix + begin : prefix + end]], -1)
    return rows[None]


def _in_batch(bias: torch.Tensor | None, batch: int, count: int) -> torch.Tensor | None:
    if bias is None:
        return None
    return bias.transpose(0, 1).expand(batch, count, *bias.shape[2:]).flatten(0, 1)


def _folded(x: torch.Tensor, count: int) -> torch.Tensor:
    """`[b, h, count · n, d]` → `[b · count, h, n, d]`."""
    return x if count == 1 else x.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def _unfolded(x: torch.Tensor, count: int) -> torch.Tensor:
    return x if count == 1 else x.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)


def _with_prefix(x: torch.Tensor, cut: slice, count: int, prefix: int) -> torch.Tensor:
    own = _folded(x[:, :, prefix:][:, :, cut], count)
    if not prefix:
        return own
    first = x[:, None, :, :prefix].expand(-1, count, -1, -1, -1).flatten(0, 1)
    return torch.cat([first, own], 2)


def _halves(heads: int) -> list[slice]:
    return [slice(0, heads // 2), slice(heads // 2, heads)] if heads > 1 else [slice(0, 1)]


def _heads_of(x: torch.Tensor, heads: slice, queries: int) -> torch.Tensor:
    """The K/V heads that serve some of the query heads; repeated only where a K/V head serves both halves."""
    repeats = queries // x.shape[1]
    if heads.start % repeats or heads.stop % repeats:
        return x.repeat_interleave(repeats, 1)[:, heads]
    return x[:, heads.start // repeats : heads.stop // repeats]


def _from_first_token(mask: torch.Tensor, prefix: int) -> torch.Tensor | None:
    """Index of the token at each place when every text begins at place 0, `[b, t]`; None where all do already."""
    tokens = mask[:, prefix:].to(torch.bool)
    leading = (tokens.to(torch.int64).cumsum(-1) == 0).sum(-1, keepdim=True)
    if not bool(leading.any()):
        return None
    length = tokens.shape[1]
    return (torch.arange(length, device=mask.device) + leading) % length + prefix


def _at(x: torch.Tensor, index: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape
    wanted = list(x.shape)
    wanted[axis] = index.shape[1]
    return x.gather(axis, index.view(shape).expand(wanted))


def _moved_keys(x: torch.Tensor, order: torch.Tensor, prefix: int) -> torch.Tensor:
    moved = _at(x, order, 2)
    return moved if not prefix else torch.cat([x[:, :, :prefix], moved], 2)


def _moved_mask(mask: torch.Tensor, order: torch.Tensor, prefix: int) -> torch.Tensor:
    return torch.cat([mask[:, :prefix], _at(mask, order, 1)], 1)


def _moved(bias: torch.Tensor, order: torch.Tensor, prefix: int) -> torch.Tensor:
    """A bias whose rows and columns follow the tokens."""
    bias = bias.expand(order.shape[0], *bias.shape[1:])
    if bias.shape[-1] > 1:
        bias = torch.cat([bias[..., :prefix], _at(bias, order, 3)], -1)
    return bias if bias.shape[-2] == 1 else _at(bias, order - prefix, 2)
