"""Pages of keys and values: which rows of a batch are whose, where a token lies, and putting it there.

The layout is told in `surgeon.kernels.paged_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

START, LENGTH, REQUEST, POSITION = range(4)


def plan(requests: Sequence[tuple[int, int]], *, tile: int = 1, pad_to: int = 0) -> torch.Tensor:
    """The segments of a batch.

    Args:
        requests: of each request in turn, the number of its rows and the position of the first of them.
        tile: at most this many rows in a segment: 1 for decode.
        pad_to: number of segments to pad to with empty ones.
    """
    segments: list[list[int]] = []
    start = 0
    for request, (rows, position) in enumerate(requests):
        segments += [[start + i, min(tile, rows - i), request, position + i] for i in range(0, rows, tile)]
        start += rows
    segments += [[start, 0, 0, 0]] * (pad_to - len(segments))
    return torch.tensor(segments, dtype=torch.int32).reshape(-1, 4)


def slots(blocks: torch.Tensor, request: int, positions: torch.Tensor, page: int, prefix: int = 0) -> torch.Tensor:
    """Where the tokens at these positions of a request lie: page · `page` + offset, `[n]` int64.

    Args:
        blocks: see above.
        request: which.
        positions: of the tokens, `[n]`.
        page: tokens in a page.
        prefix: the request's number of prefix columns.
    """
    at = positions.long() + padded(prefix, page)
    return blocks[request].long()[at // page] * page + at % page


def padded(prefix: int, page: int) -> int:
    """The slots that a prefix takes: whole pages."""
    return -(-prefix // page) * page


def put(k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Put keys `[n, h_kv, d]` and values `[n, h_kv, d_v]` into their slots `[n]` int64, no two of them the same.

    Rows that stand for nothing (padding) go to a page that no request owns.
    """
    k_pages.view(-1, *k.shape[1:]).index_copy_(0, slots, k.to(k_pages.dtype))
    v_pages.view(-1, *v.shape[1:]).index_copy_(0, slots, v.to(v_pages.dtype))


write_pages = torch.library.custom_op("surgeon::write_pages", put, mutates_args=("k_pages", "v_pages"))


@write_pages.register_fake
def _(*given: torch.Tensor) -> None:
    return None
