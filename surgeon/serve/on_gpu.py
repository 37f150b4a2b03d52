"""Which kernels run in place of plain torch where a server's tensors are on a GPU: None where plain torch goes on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from surgeon.on_gpu import is_gpu
from surgeon.remembered import Remembered
from surgeon.serve.layout import COLUMN_BIAS, COUNT, LENGTH, WINDOWED
from surgeon.serve.packed import BIAS, INPUT, OUTPUT, RANK


def bypass(
    y: Tensor, x: Tensor, bias: Tensor | None, pool: Tensor, rows: Tensor, table: Tensor, scales: Tensor, owners: Tensor
) -> Tensor | None:
    """`surgeon.serve.bypass.pooled_bypass` by `surgeon.kernels.multi_adapter`; y may be returned as it is."""
    if not is_gpu(y):
        return None
    from surgeon.kernels import multi_adapter, shrink_expand

    flat, given = y.reshape(-1, y.shape[-1]).contiguous(), x.reshape(-1, x.shape[-1]).contiguous()
    if multi_adapter.can_use(flat, given, pool):
        return None
    rank, changes, _ = _contents(table)
    if not (rank or changes):
        return y
    segments = _segments(owners)
    return shrink_expand.launch(flat, given, bias, pool, rows, table, scales, segments, rank).view(y.shape)


def scaled_input(x: Tensor, pool: Tensor, rows: Tensor, table: Tensor, owners: Tensor) -> Tensor | None:
    """`surgeon.serve.bypass.pooled_input` by `surgeon.kernels.multi_adapter`; x may be returned as it is."""
    if not is_gpu(x):
        return None
    from surgeon.kernels import multi_adapter, shrink_expand

    given = x.reshape(-1, x.shape[-1]).contiguous()
    if multi_adapter.can_use(given, given, pool):
        return None
    if not _contents(table)[2]:
        return x
    return shrink_expand.launch_scale(given, pool, rows, table, _segments(owners)).view(x.shape)


def _read(table: Tensor) -> tuple[int, bool, bool]:
    """The highest rank, whether outputs are scaled or have biases of their own, and whether inputs are scaled."""
    lines = table.tolist()
    changes = any(max(line[OUTPUT], line[BIAS]) >= 0 for line in lines)
    return max((line[RANK] for line in lines), default=0), changes, any(line[INPUT] >= 0 for line in lines)


def _planned(owners: Tensor) -> Tensor:
    from surgeon.kernels import multi_adapter

    return multi_adapter.plan(owners.tolist()).to(owners.device)


_contents = Remembered(_read)
_segments = Remembered(_planned)


def attention(
    q: Tensor,
    views: tuple[Tensor, Tensor],
    sinks: Tensor | None,
    spans: Tensor,
    blocks: Tensor,
    prefix: Tensor,
    *,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor | None:
    """`surgeon.serve.paged.paged_attention` by `surgeon.kernels.paged_attention`, `[1, h, n, d_v]`.

    Args:
        q: queries `[1, h, n, d]`.
        views: pages of keys and of values, those of the new tokens written.
        sinks: see `surgeon.ops.attention`, as scale, window and softcap.
        spans: `[requests, 3]`: FIRST, COUNT, PAST.
        blocks: pages of each request `[requests, n]`, those of its learned columns first.
        prefix: `[requests, …]`: LENGTH of the learned columns, WINDOWED, COLUMN_BIAS.
        scale: see sinks.
        window: see sinks.
        softcap: see sinks.
    """
    if not is_gpu(q):
        return None
    from surgeon.kernels import paged_attend, paged_attention

    rows, (heads, kv) = q[0].transpose(0, 1).contiguous(), (q.shape[1], views[0].shape[2])
    learned, windowed, plain = _learned(prefix)
    most, tile = _longest(spans), paged_attend.longest(heads, kv, q.dtype)
    tile = min(tile, most)
    if not plain or (window and windowed is None) or paged_attention.can_use(rows, *views, tile):
        return None
    prefixes = prefix[:, LENGTH].to(torch.int32) if learned else None
    found = paged_attend.launch(
        rows, *views, blocks.to(torch.int32), prefixes, _pieces(tile)(spans), sinks, scale=scale, window=window,
        softcap=softcap, windowed=bool(windowed), tile=tile,
    )  # fmt: skip
    return found.transpose(0, 1)[None]


def _columns(prefix: Tensor) -> tuple[bool, bool | None, bool]:
    """Whether there are learned columns, whether windows hide them (None: those of some), and that none has a bias."""
    lines = prefix.tolist()
    ways = {bool(line[WINDOWED]) for line in lines if line[LENGTH]}
    windowed = None if len(ways) > 1 else next(iter(ways), False)
    return bool(ways), windowed, all(line[COLUMN_BIAS] < 0 for line in lines)


@functools.cache
def _pieces(tile: int) -> Remembered[Tensor]:
    """Spans in segments of at most so many rows."""

    def make(spans: Tensor) -> Tensor:
        from surgeon.kernels.pages import plan

        return plan([(count, past) for _, count, past in spans.tolist()], tile=tile).to(spans.device)

    return Remembered(make)


_learned = Remembered(_columns)
_longest = Remembered(lambda spans: int(spans[:, COUNT].max()))
