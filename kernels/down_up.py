"""The kernels of a low-rank bypass; what they are for is told in `surgeon.kernels.bypass`.

    down   low[split] = x Aᵀ over the split's share of the inputs        a program: BM rows, BR ranks
    up     y' = y + scale · gain ⊙ ((diagonal ⊙ Σ low) Bᵀ)               a program: BM rows, BN outputs

A and B are given with both strides, so that either may be read transposed: the gradient of the input is the same two
kernels with B and A in each other's place. `gain` of down multiplies x (the output's gradient, at VeRA). Ranks above
the last are masked to 0 and the tile of ranks is never below 16.

Tiles: up to 64 rows a program has 16 and the inner dimension of down is split over four, in places of their own that
up adds in order; above it has 64 rows and down is not split. fp32 has no tensor core that is exact: 16 rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgeon.kernels.aot import Variant
from surgeon.kernels.jit import TYPES, Constant, Float, Int, Ptr, kernel

if TYPE_CHECKING:
    import triton.language as tl

FEW, SPLITS, RANKS, INNER = 64, 4, 16, 64
"""Rows up to which they count as few; splits then; ranks in a tile of up; inputs in a tile of down."""


@kernel("N/BM", "R/BR", "SPLITS")
def down(
    x: Ptr,
    a: Ptr,
    gain: Ptr,
    low: Ptr,
    N: Int,
    R: Int,
    K: Int,
    x_row: Int,
    a_rank: Int,
    a_in: Int,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    GAINED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """low `[SPLITS, N, R]` fp32."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BR + tl.arange(0, BR)
    split = tl.program_id(2)
    total = tl.zeros((BM, BR), tl.float32)
    for k0 in range(split * BK, K, SPLITS * BK):
        k = k0 + tl.arange(0, BK)
        xs = tl.load(x + m.to(tl.int64)[:, None] * x_row + k, mask=(m < N)[:, None] & (k < K), other=0.0)
        at = k.to(tl.int64)[:, None] * a_in + j.to(tl.int64)[None, :] * a_rank
        w = tl.load(a + at, mask=(k < K)[:, None] & (j < R), other=0.0)
        if UPCAST:
            xs, w = xs.to(tl.float32), w.to(tl.float32)
        if GAINED:
            factor = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
            xs = (xs.to(tl.float32) * factor[None, :]).to(w.dtype)
        total = tl.dot(xs, w, total, input_precision="ieee")
    place = (split * N + m).to(tl.int64)[:, None] * R + j
    tl.store(low + place, total, mask=(m < N)[:, None] & (j < R))


@kernel("N/BM", "OUT/BN")
def up(
    y: Ptr,
    low: Ptr,
    b: Ptr,
    diagonal: Ptr,
    gain: Ptr,
    result: Ptr,
    N: Int,
    R: Int,
    OUT: Int,
    WIDTH: Int,
    first: Int,
    y_row: Int,
    b_out: Int,
    b_rank: Int,
    scale: Float,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    SPLITS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    GAINED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """y' `[N, OUT]` from columns `first` to `first` + R of low `[SPLITS, N, WIDTH]`."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for j0 in range(0, R, BR):
        j = j0 + tl.arange(0, BR)
        at = n.to(tl.int64)[None, :] * b_out + j.to(tl.int64)[:, None] * b_rank
        w = tl.load(b + at, mask=(j < R)[:, None] & (n < OUT), other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
        part = tl.zeros((BM, BR), tl.float32)
        for split in tl.static_range(SPLITS):
            place = (split * N + m).to(tl.int64)[:, None] * WIDTH + first + j
            part += tl.load(low + place, mask=(m < N)[:, None] & (j < R), other=0.0)
        if DIAGONAL:
            part *= tl.load(diagonal + j, mask=j < R, other=0.0).to(tl.float32)[None, :]
        total = tl.dot(part.to(w.dtype), w, total, input_precision="ieee")
    kept = (m < N)[:, None] & (n < OUT)
    if GAINED:
        total *= tl.load(gain + n, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    value = tl.load(y + m.to(tl.int64)[:, None] * y_row + n, mask=kept, other=0.0).to(tl.float32) + scale * total
    tl.store(result + m.to(tl.int64)[:, None] * OUT + n, value.to(result.dtype.element_ty), mask=kept)


def launch_down(x: torch.Tensor, a: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
    """low `[splits, n, ranks]` of x `[n, in]` and a `[ranks, in]`, both of any row stride; the sum over splits is x Aᵀ.

    Args:
        x: a row's elements lie side by side.
        a: of any strides.
        gain: factor on x `[in]`.
    """
    few = len(x) <= FEW
    low = x.new_empty(SPLITS if few else 1, len(x), len(a), dtype=torch.float32)
    down.launch(
        x=x, a=a, gain=x if gain is None else gain, low=low, N=len(x), R=len(a), K=x.shape[1], x_row=x.stride(0),
        a_rank=a.stride(0), a_in=a.stride(1), BR=RANKS, BK=INNER, SPLITS=len(low), GAINED=gain is not None,
        UPCAST=x.device.type == "cpu", **rows(len(x), x.dtype),
    )  # fmt: skip
    return low


def launch_up(
    y: torch.Tensor,
    low: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    first: int = 0,
    diagonal: torch.Tensor | None = None,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """y' of y `[n, out]`, low `[splits, n, width]` from column `first` on, and b `[out, ranks]` of any strides."""
    result = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    up.launch(
        y=y, low=low, b=b, diagonal=y if diagonal is None else diagonal, gain=y if gain is None else gain,
        result=result, N=len(y), R=b.shape[1], OUT=y.shape[1], WIDTH=low.shape[2], first=first, y_row=y.stride(0),
        b_out=b.stride(0), b_rank=b.stride(1), scale=float(scale), BN=64 if y.dtype == torch.float32 else 128, BR=RANKS,
        SPLITS=len(low), DIAGONAL=diagonal is not None, GAINED=gain is not None, UPCAST=y.device.type == "cpu",
        **rows(len(y), y.dtype),
    )  # fmt: skip
    return result


def rows(count: int, dtype: torch.dtype) -> dict[str, int]:
    """The tile of rows of a batch of this many, and the warps that go with it."""
    return {"BM": 16, "warps": 2} if count <= FEW or dtype == torch.float32 else {"BM": 64, "warps": 4}


def _variants(dtype: torch.dtype, few: bool, vectors: bool = False, backward: bool = False) -> tuple[Variant, ...]:
    word, tile = TYPES[dtype], rows(1 if few else FEW + 1, dtype)
    warps = tile.pop("warps")
    same: dict[str, Constant] = {**tile, "BR": RANKS, "SPLITS": SPLITS if few else 1, "UPCAST": False}
    label = f"{word}-m{tile['BM']}" + "-few" * few + "-vectors" * vectors + "-backward" * backward
    return (
        Variant(
            down, label, f"*{word} *{word} *{word} *fp32 i32 i32 i32 i32 i32 i32",
            {**same, "BK": INNER, "GAINED": vectors and backward}, warps=warps,
            divisible=frozenset({"K", "x_row", "a_in" if backward else "a_rank"}),
        ),
        Variant(
            up, label, f"*{word} *fp32 *{word} *{word} *{word} *{word} i32 i32 i32 i32 i32 i32 i32 i32 fp32",
            {**same, "BN": 64 if word == "fp32" else 128, "DIAGONAL": vectors, "GAINED": vectors and not backward},
            warps=warps, divisible=frozenset({"OUT", "y_row"}),
        ),
    )  # fmt: skip


VARIANTS = (
    *_variants(torch.bfloat16, True),
    *_variants(torch.bfloat16, False),
    *_variants(torch.bfloat16, True, vectors=True),
    *_variants(torch.bfloat16, False, vectors=True, backward=True),
    *_variants(torch.bfloat16, False, backward=True),
    *_variants(torch.float32, True),
    *_variants(torch.float32, False, vectors=True, backward=True),
)
