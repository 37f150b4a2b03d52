"""What of a graph the pool has to hold: its attentions' keys and values, and the sites an adapter may change."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgeon.graph import Graph
from surgeon.sites import ATTENTION, Site, sites

BLOCK = 16
# Columns of a batch's spans, a line per request: its first token in the batch, its new tokens, its old ones.
FIRST, COUNT, PAST = range(3)
# Columns of a batch's learned columns: how many, how windows treat them, the row of their biases, and their pages.
LENGTH, WINDOWED, COLUMN_BIAS, PAGES = range(4)


@dataclass(frozen=True)
class Layout:
    """Sizes of the pool's pages for one model.

    A page holds keys and values of `block` tokens at one attention: keys `[block, h_kv, d]` from its start, values
    `[block, h_kv, d_v]` from its middle.

    Attributes:
        attentions: in the order of the model.
        linears: the linears an adapter may change, in the order of the model.
        block: tokens per page.
        page: numbers per page.
        hidden: width of an embedded token, 0 for a model whose tokens no rows can stand before.
    """

    attentions: tuple[Site, ...]
    linears: tuple[Site, ...]
    block: int
    page: int
    hidden: int = 0

    def blocks(self, tokens: int) -> int:
        """Pages that tokens need at one attention."""
        return -(-tokens // self.block)

    def pages(self, tokens: int) -> int:
        """Pages that tokens need at all attentions."""
        return self.blocks(tokens) * len(self.attentions)


def layout_of(graph: Graph, linears: tuple[Site, ...], hidden: int = 0, block: int = 0) -> Layout:
    """The layout of a graph: pages with room for `block` tokens, and for the widest row of an adapter."""
    attentions = tuple(sites(graph, ATTENTION))
    unit = max(site.heads * max(site.inp, site.out) for site in attentions)
    widest = max([hidden, *(max(site.inp, site.out) for site in linears)])
    block = max(block or BLOCK, -(-widest // unit))
    return Layout(attentions, linears, block, 2 * block * unit, hidden)


def kv_views(pool: torch.Tensor, page: int, block: int, sizes: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """Keys `[pages, block, h_kv, d]` and values `[pages, block, h_kv, d_v]` of a pool, for sizes (h_kv, d, d_v)."""
    heads, key, value = sizes
    halves = pool.view(-1, 2, page // 2)
    count = len(halves)
    return tuple(
        halves[:, part, : block * heads * size].view(count, block, heads, size) for part, size in ((0, key), (1, value))
    )
