"""Where the tiles of shifted sparse attention lie: positions, tokens and pointers, for the forward and backward pass.

Positions count along the text as a head cuts it: segment s is the positions s·G … (s + 1)·G − 1, and nothing else has
to be compared. Shift and padding only enter where a position becomes a token,

    token(p) = p − shift + first               shift = 0 for the first half of the heads, ⌊G / 2⌋ for the second
    token(p) = ((p − shift + G) mod T + first) mod T      in the paper's form, `WRAP`, for heads that are shifted

with `first` the first token of a row that is not padding. No copy of q, k or v is turned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon.kernels.jit import Int, Ptr, Tile, kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel()
def first_token(first: Ptr, row: Int, MASKED: tl.constexpr) -> Int:
    """The first token of a text that is not padding."""
    token = row * 0
    if MASKED:
        token = tl.load(first + row)
    return token


@kernel()
def bounds(shift: Int, first: Int, T: Int, WRAP: tl.constexpr) -> tuple[Int, Int]:
    """The positions that are tokens: low <= p < high."""
    low, high = shift, T - first + shift
    if WRAP:
        low, high = shift * 0, T
    return low, high


@kernel()
def tokens(p: Tile, shift: Int, first: Int, T: Int, G: Int, WRAP: tl.constexpr) -> Tile:
    """The token at each position."""
    token = p - shift + first
    if WRAP:
        token = ((p + tl.where(shift > 0, G - shift, 0)) % T + first) % T
    return token


@kernel()
def load_rows(
    at: Ptr, token: Tile, stride: Int, inside: Tile, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr
) -> Tile:
    """Rows `[n, BD]` of a tensor whose last stride is 1; columns from D on are zero."""
    column = tl.arange(0, BD)
    rows = at + token.to(tl.int64)[:, None] * stride + column[None, :]
    mask = inside[:, None]
    if D < BD:
        mask = mask & (column < D)[None, :]
    found = tl.load(rows, mask=mask, other=0.0)
    if UPCAST:
        found = found.to(tl.float32)
    return found


@kernel()
def store_rows(at: Ptr, token: Tile, stride: Int, inside: Tile, rows: Tile, D: tl.constexpr, BD: tl.constexpr) -> None:
    """The inverse of `load_rows`."""
    column = tl.arange(0, BD)
    mask = inside[:, None]
    if D < BD:
        mask = mask & (column < D)[None, :]
    tl.store(at + token.to(tl.int64)[:, None] * stride + column[None, :], rows.to(at.dtype.element_ty), mask=mask)


@kernel()
def not_padding(mask: Ptr, token: Tile, inside: Tile, MASKED: tl.constexpr) -> Tile:
    """Which positions are keys."""
    is_key = inside
    if MASKED:
        is_key = inside & (tl.load(mask + token, mask=inside, other=0) != 0)
    return is_key


@kernel()
def follows(query: Tile, key: Tile, is_key: Tile, WINDOW: Int, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr) -> Tile:
    """Which keys of its segment a query sees; positions that broadcast to a tile."""
    visible = is_key
    if CAUSAL:
        visible = visible & (key <= query)
    if WINDOWED:
        visible = visible & (key > query - WINDOW)
    return visible
