"""What products with coded weights share: the end of the kernels, the tiles, and when they are the right ones.

    y = x Wᵀ + low upᵀ + bias,   low = scale · x aᵀ [M, r], computed once by a library

x `[M, K]`, W `[N, K]` in codes, up `[N, r]`. A program owns a tile `[BN, BM]` of yᵀ: the weights are the *left* operand
of every tile product. They are what is many (BN = 64 rows against 16 tokens), and a decoded tile in the place of the
left operand stays in registers; on the right, the same kernel spilled 80 … 4680 bytes per thread.

The low-rank term is added where the tile is still in registers. low is not computed here: every one of the N / BN
programs would read x and a again for it.

Small M only. Decoding costs the same for 1 token as for BM, and each further tile of tokens decodes W again; from
`MOST_ROWS` tokens on, W is decoded once and multiplied by a library. bitsandbytes draws the line at about the same
place on GPUs with HBM; here it is not measured yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgeon.kernels.jit import Int, Ptr, Tile, kernel

if TYPE_CHECKING:
    import triton.language as tl

MOST_ROWS = 32
RANKS = 64
"""Ranks of a tile of the low-rank term at most: with 128 at once the kernel of 3-bit codes spills on sm_80."""


@kernel()
def transposed_rows(x: Ptr, k: Tile, m: Tile, stride: Int, K: Int, M: Int, UPCAST: tl.constexpr) -> Tile:
    """xᵀ `[BK, BM]`, zero outside."""
    found = tl.load(x + m[None, :] * stride + k[:, None], mask=(k[:, None] < K) & (m[None, :] < M), other=0.0)
    if UPCAST:
        found = found.to(tl.float32)
    return found


@kernel()
def finish(
    total: Tile, n: Tile, m: Tile, bias: Ptr, low: Ptr, up: Ptr, y: Ptr, N: Int, M: Int, R: Int,
    BIASED: tl.constexpr, BR: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Adds the low-rank term and the bias to a tile `[BN, BM]` and stores it transposed."""
    if BR > 0:
        for begin in range(0, R, BR):
            r = begin + tl.arange(0, BR)
            left = tl.load(up + n[:, None] * R + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
            if UPCAST:
                left = left.to(tl.float32)
            total = tl.dot(left, transposed_rows(low, r, m, R, R, M, UPCAST), total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + m[None, :] * N + n[:, None], total.to(y.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


def unfit(x: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None) -> str:
    """Why no kernel takes x `[M, K]` and the terms beside the product, "" if they do."""
    if x.shape[0] > MOST_ROWS:
        return f"{x.shape[0]} rows: a library multiplies them faster with the decoded weight"
    if x.stride(1) != 1 and x.shape[1] > 1:
        return "rows of x that are not contiguous"
    if (low is None) != (up is None):
        return "half of a low-rank term"
    if any(term is not None and (term.dtype != x.dtype or not term.is_contiguous()) for term in (bias, low, up)):
        return f"a bias or a low-rank term that is not contiguous in {x.dtype}"
    return ""


def arguments(x: Tensor, y: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None) -> dict[str, Any]:
    """Those of x, y and the terms; x stands for what is not there, and is not read for it."""
    rank = 0 if up is None else up.shape[1]
    ranks = min(RANKS, max(16, 1 << (rank - 1).bit_length())) if rank else 0
    return {
        "x": x, "y": y, "bias": x if bias is None else bias, "low": x if low is None else low,
        "up": x if up is None else up, "M": x.shape[0], "N": y.shape[1], "K": x.shape[1], "R": rank,
        "x_m": x.stride(0), "BIASED": bias is not None, "BR": ranks,
        "BM": 16 if x.shape[0] <= 16 else 32, "UPCAST": x.device.type == "cpu",
    }  # fmt: skip
