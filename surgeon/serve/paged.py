"""Attention over keys and values in pages of the pool.

    softmax(q [P_k; K]ᵀ) [P_v; V]      P: learned columns of the request's adapter, K, V: its tokens so far

The keys and values of new tokens are written first. Requests with one new token are attended together, padded to the
longest of similar lengths; a piece of a prompt by itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from surgeon import ops
from surgeon.serve.layout import kv_views

_LIBRARY = torch.library.Library("surgeon", "FRAGMENT")
_LIBRARY.define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor(a!) pool, Tensor spans, Tensor table, "
    "Tensor prefix, *, float scale, int window=0, int chunk=0, float softcap=0.0, int page, int block, "
    "bool each=False) -> Tensor"
)
FIRST, COUNT, PAST = range(3)  # columns of spans: first token of a request in the batch, its new tokens, its old ones
LENGTH, WINDOWED, BIAS, PAGES = range(4)  # columns of prefix: learned columns, how windows treat them, biases, pages


@dataclass(frozen=True)
class Slots:
    """Where a batch's tokens lie; the same at all attentions with the same learned columns.

    Attributes:
        requests: request of each new token `[n]`.
        blocks: which of the request's pages it lies in `[n]`.
        offsets: place in that page `[n]`.
        together: requests with one new token each, in groups of similar length.
        alone: (request, its first token in the batch, new tokens, old tokens) of the others.
    """

    requests: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    together: tuple[Group, ...]
    alone: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Group:
    """Requests with one new token that are attended together.

    Attributes:
        tokens: that token of each `[b]`.
        requests: which `[b]`.
        front: of how many pages of learned columns come first `[b, 1]`.
        numbers: 0 to the number of pages `[b, n]`.
        places: position of every cell of the pages: columns are before 0, and what is empty is beyond every token
            `[b, n · block]`.
        last: position of the new token `[b, 1]`.
        windowed: whether a window hides the columns `[b, 1]`.
        columns: how many learned columns there are `[b, 1]`.
    """

    tokens: torch.Tensor
    requests: torch.Tensor
    front: torch.Tensor
    numbers: torch.Tensor
    places: torch.Tensor
    last: torch.Tensor
    windowed: torch.Tensor
    columns: torch.Tensor


_known: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor], Slots]] = {}
_EMPTY = 2**40


def slots(spans: torch.Tensor, prefix: torch.Tensor, block: int, each: bool = False) -> Slots:
    """Where the tokens of a batch lie, remembered for as long as `spans` lives."""
    key = (id(spans), id(prefix))
    found = _known.get(key)
    if found is not None and found[0]() is spans and found[1]() is prefix:
        return found[2]
    made = _slots(spans, prefix, block, each)
    _known[key] = (weakref.ref(spans, lambda _: _known.pop(key, None)), weakref.ref(prefix), made)
    return made


def _slots(spans: torch.Tensor, prefix: torch.Tensor, block: int, each: bool) -> Slots:
    counts, past = spans[:, COUNT], spans[:, PAST]
    request = torch.repeat_interleave(counts)
    position = torch.arange(len(request), device=spans.device) - spans[request, FIRST] + past[request]
    listed, learned = spans.tolist(), prefix.tolist()
    single = [i for i, (_, count, _) in enumerate(listed) if count == 1 and learned[i][BIAS] < 0 and not each]
    alone = [(i, *listed[i]) for i in sorted({*range(len(listed))} - {*single})]
    if each:
        alone = [(i, first + n, 1, past + n) for i, first, count, past in alone for n in range(count)]
    groups = tuple(_group(chosen, spans, prefix, block) for chosen in _similar(single, listed, learned, block))
    return Slots(request, position // block, position % block, groups, tuple(alone))


def _similar(single: list[int], spans: list[list[int]], prefix: list[list[int]], block: int) -> list[list[int]]:
    """Requests in groups in which nobody has less than half of the longest's pages."""
    sizes = {i: -(-(spans[i][PAST] + 1) // block) + -(-prefix[i][LENGTH] // block) for i in single}
    groups: list[list[int]] = []
    for i in sorted(single, key=sizes.__getitem__, reverse=True):
        if groups and 2 * sizes[i] >= sizes[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _group(chosen: list[int], spans: torch.Tensor, prefix: torch.Tensor, block: int) -> Group:
    index = torch.tensor(chosen, device=spans.device)
    own, learned = spans[index], prefix[index]
    columns, last = learned[:, LENGTH, None], own[:, PAST, None]
    front = -(-columns // block)
    total = int((front + last // block + 1).max())
    cell = torch.arange(total * block, device=spans.device).expand(len(chosen), -1)
    text = cell - front * block
    places = torch.where(text < 0, torch.where(cell < columns, cell - columns, _EMPTY), text)
    numbers = torch.arange(total, device=spans.device).expand(len(chosen), -1)
    return Group(own[:, FIRST], index, front, numbers, places, last, learned[:, WINDOWED, None], columns)


def _pages(group: Group, table: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
    """The pages of a group's requests `[b, n]`, those of learned columns first."""
    rest = (group.numbers - group.front).clamp(0, table.shape[1] - 1)
    pages = torch.gather(table[group.requests], 1, rest)
    if prefix.shape[1] > PAGES:
        learned = prefix[group.requests, PAGES:]
        first = torch.gather(learned, 1, group.numbers.clamp(max=learned.shape[1] - 1))
        pages = torch.where(group.numbers < group.front, first, pages)
    return pages


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    pool: torch.Tensor,
    spans: torch.Tensor,
    table: torch.Tensor,
    prefix: torch.Tensor,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    page: int,
    block: int,
    each: bool = False,
) -> torch.Tensor:
    """Attention of a batch's new tokens, `[1, h, n, d_v]`; their keys and values are in the pool afterwards.

    Args:
        q: queries `[1, h, n, d]` of all new tokens, request after request.
        k: keys `[1, h_kv, n, d]`.
        v: values `[1, h_kv, n, d_v]`.
        sinks: see `surgeon.ops.attention`.
        pool: all numbers.
        spans: `[requests, 3]`: FIRST, COUNT, PAST.
        table: pages of each request's tokens `[requests, blocks]`.
        prefix: `[requests, PAGES + blocks]`: LENGTH of the learned columns, WINDOWED, row of their BIAS in the pool's
            view of its width or −1, and their pages.
        scale: see `surgeon.ops.attention`.
        window: see `surgeon.ops.attention`.
        chunk: see `surgeon.ops.attention`.
        softcap: see `surgeon.ops.attention`.
        page: numbers per page.
        block: tokens per page.
        each: one token at a time, so that its result depends on nothing but its own request.
    """
    keys, values = kv_views(pool, page, block, (k.shape[1], k.shape[3], v.shape[3]))
    where = slots(spans, prefix, block, each)
    count, pages = len(where.requests), table[where.requests, where.blocks]
    keys[pages, where.offsets] = k[0, :, :count].transpose(0, 1)
    values[pages, where.offsets] = v[0, :, :count].transpose(0, 1)
    result = v.new_zeros(q.shape[2], q.shape[1], v.shape[3])
    attend: Callable[..., torch.Tensor] = lambda *args, **more: ops.attention(  # noqa: E731
        *args, scale=scale, softcap=softcap, **more
    )
    for group in where.together:
        found = _pages(group, table, prefix)
        result[group.tokens] = _together(q, group, found, (keys, values), sinks, attend, window, chunk)
    for one in where.alone:
        result[one[1] : one[1] + one[2]] = _alone(
            q, one, table, prefix, (keys, values), sinks, pool, attend, window, chunk
        )
    return result.transpose(0, 1)[None]


def _together(
    q: torch.Tensor,
    group: Group,
    pages: torch.Tensor,
    views: tuple[torch.Tensor, torch.Tensor],
    sinks: torch.Tensor | None,
    attend: Callable[..., torch.Tensor],
    window: int,
    chunk: int,
) -> torch.Tensor:
    """`[b, h, d_v]`: with one query a window is a mask of keys like any other."""
    seen = group.places <= group.last
    if window or chunk:
        # Columns that a window treats as tokens are the first ones: chunks are counted from them.
        start = torch.where(group.windowed != 0, group.columns, 0)
        near = _near(group.places + start, group.last + start, window, chunk)
        seen &= near | ((group.places < 0) & (group.windowed == 0))
    flat, size = pages.flatten(), len(pages)
    k, v = (view.index_select(0, flat).view(size, -1, *view.shape[2:]).transpose(1, 2) for view in views)
    queries = q[0, :, group.tokens].transpose(0, 1)[:, :, None]
    return attend(queries, k, v, seen, None, sinks)[:, :, 0]


def _near(places: torch.Tensor, last: torch.Tensor, window: int, chunk: int) -> torch.Tensor:
    near = torch.ones_like(places, dtype=torch.bool)
    if window:
        near &= places > last - window
    if chunk:
        near &= torch.div(places, chunk, rounding_mode="floor") == torch.div(last, chunk, rounding_mode="floor")
    return near


def _alone(
    q: torch.Tensor,
    one: tuple[int, int, int, int],
    table: torch.Tensor,
    prefix: torch.Tensor,
    views: tuple[torch.Tensor, torch.Tensor],
    sinks: torch.Tensor | None,
    pool: torch.Tensor,
    attend: Callable[..., torch.Tensor],
    window: int,
    chunk: int,
) -> torch.Tensor:
    """`[n, h, d_v]`, a piece of one request's text."""
    request, first, count, past = one
    learned, hidden, bias_row, *pages = prefix[request].tolist()
    block = views[0].shape[1]
    blocks = table[request, : -(-(past + count) // block)]
    parts = []
    for view in views:
        own = view[blocks].flatten(0, 1)[: past + count]
        front = view[pages[: -(-learned // block)]].flatten(0, 1)[:learned]
        parts.append(torch.cat([front, own]).transpose(0, 1)[None] if learned else own.transpose(0, 1)[None])
    options: dict[str, Any] = {"causal": True, "window": window, "chunk": chunk}
    if learned and not hidden:
        options["prefix"] = learned
    bias = None if bias_row < 0 else _column_bias(pool, bias_row, q.shape[1], learned, past + count)
    return attend(q[:, :, first : first + count], *parts, None, bias, sinks, **options)[0].transpose(0, 1)


def _column_bias(pool: torch.Tensor, row: int, heads: int, columns: int, keys: int) -> torch.Tensor:
    """What is added to the scores `[1, h, 1, p + keys]`."""
    width = heads * columns
    found = pool[row * width : (row + 1) * width].view(1, heads, 1, columns)
    return torch.nn.functional.pad(found, (0, keys))


def _shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


_LIBRARY.impl("paged_attention", paged_attention, "CompositeExplicitAutograd")
torch.library.register_fake("surgeon::paged_attention", _shape, lib=_LIBRARY)
