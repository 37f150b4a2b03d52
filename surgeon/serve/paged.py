"""Attention over keys and values in pages of the pool.

    softmax(q [P_k; K]ᵀ) [P_v; V]      P: learned columns of the request's adapter, K, V: its tokens so far

The keys and values of new tokens are written first. Requests with one new token are attended together, padded to the
longest of similar lengths; a piece of a prompt by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from surgeon import ops
from surgeon.serve import on_gpu
from surgeon.serve.layout import LENGTH, PAGES, kv_views
from surgeon.serve.slots import Group, slots

_LIBRARY = torch.library.Library("surgeon", "FRAGMENT")
_LIBRARY.define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor(a!) pool, Tensor spans, Tensor table, "
    "Tensor prefix, *, float scale, int window=0, int chunk=0, float softcap=0.0, int page, int block, "
    "bool each=False) -> Tensor"
)


def _pages(table: torch.Tensor, learned: torch.Tensor, front: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Pages by their `numbers` in each request `[b, n]`: `front` of learned columns first, then those of tokens."""
    pages = torch.gather(table, 1, (numbers - front).clamp(0, table.shape[1] - 1))
    if learned.shape[1]:
        pages = torch.where(numbers < front, torch.gather(learned, 1, numbers.clamp(max=learned.shape[1] - 1)), pages)
    return pages


def _all_pages(table: torch.Tensor, prefix: torch.Tensor, block: int) -> torch.Tensor:
    """The pages of every request `[requests, n]`."""
    learned = prefix[:, PAGES:]
    if not learned.shape[1]:
        return table
    numbers = torch.arange(learned.shape[1] + table.shape[1], device=table.device).expand(len(table), -1)
    return _pages(table, learned, -(-prefix[:, LENGTH, None] // block), numbers)


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
        each: one token at a time, so that its result depends on nothing but its own request; by plain torch, since how
            a kernel deals keys out depends on the batch.
    """
    keys, values = kv_views(pool, page, block, (k.shape[1], k.shape[3], v.shape[3]))
    where = slots(spans, prefix, block=block, each=each)
    count, pages = len(where.requests), table[where.requests, where.blocks]
    keys[pages, where.offsets] = k[0, :, :count].transpose(0, 1)
    values[pages, where.offsets] = v[0, :, :count].transpose(0, 1)
    if not (chunk or each):
        options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
        blocks = _all_pages(table, prefix, block)
        found = on_gpu.attention(q, (keys, values), sinks, spans, blocks, prefix, **options)
        if found is not None:
            return found
    result = v.new_zeros(q.shape[2], q.shape[1], v.shape[3])
    attend: Callable[..., torch.Tensor] = lambda *args, **more: ops.attention(  # noqa: E731
        *args, scale=scale, softcap=softcap, **more
    )
    for group in where.together:
        found = _pages(table[group.requests], prefix[group.requests, PAGES:], group.front, group.numbers)
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
