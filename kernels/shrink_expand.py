"""The kernels for many adapters over one batch; `surgeon.kernels.multi_adapter` tells what they work on.

    shrink   low[split, i, j] = l_j · Σ over the split's share of k of x[i, k] · A[j, k]    a program: 16 rows, 16 ranks
    expand   y'[i, :] = s ⊙ (y[i, :] + o ⊙ (scale · Σ_j low[i, j] B[j, :])) + bias_a    a program: 16 rows, BN outputs

A segment has at most 16 rows, all of one adapter, so one row tile is one adapter: the smallest that a tensor core
multiplies, and decode (segments of one or two rows) wastes rows of x but reads every row of the pool once, which is
what it is bound by. Those are gathered 16 at a time through the row table, ranks above the adapter's own masked to 0:
the inner dimension of every product is at least 16 whatever the rank.

The output of shrink is narrow, so its inner dimension is split over programs to fill a GPU; every split writes a place
of its own and expand adds them up in order. Nothing is added in memory: the same batch gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from surgeon.kernels.aot import Variant
from surgeon.kernels.jit import Float, Int, Ptr, Tile, kernel
from surgeon.serve import packed

if TYPE_CHECKING:
    import triton.language as tl

ROWS, RANKS, INNER, COLUMNS, SPLITS = 16, 16, 128, 128, 4
"""Tile of rows, of ranks, of inputs and of outputs, and the splits of the inputs: the same for every batch, so that a
row's bits do not depend on what else is in it."""
FIRST_A, FIRST_B, RANK, LOW = packed.FIRST_A, packed.FIRST_B, packed.RANK, packed.LOW
OUT, INPUT, OUTPUT, BIAS = packed.OUT, packed.INPUT, packed.OUTPUT, packed.BIAS


@kernel("T", "R/BR", "SPLITS")
def shrink(
    x: Ptr,
    pool: Ptr,
    rows: Ptr,
    table: Ptr,
    segments: Ptr,
    low: Ptr,
    T: Int,
    N: Int,
    R: Int,
    IN: Int,
    LINE: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """low `[SPLITS, N, R]` fp32."""
    segment, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(segments + segment * 3)
    length = tl.load(segments + segment * 3 + 1)
    adapter = tl.load(segments + segment * 3 + 2)
    used = (length > 0) & (adapter >= 0)
    line = table + adapter.to(tl.int64) * LINE
    first = tl.load(line + FIRST_A, mask=used, other=0)
    rank = tl.load(line + RANK, mask=used, other=0)
    factors = tl.load(line + LOW, mask=used, other=-1)
    m, j = tl.arange(0, BM), tile * BR + tl.arange(0, BR)
    if tile * BR < rank:
        row = (start + m).to(tl.int64)
        at = tl.load(rows + first + j, mask=j < rank, other=0) * IN
        total = tl.zeros((BM, BR), tl.float32)
        for k0 in range(split * BK, IN, SPLITS * BK):
            k = k0 + tl.arange(0, BK)
            inside = k < IN
            xs = tl.load(x + row[:, None] * IN + k, mask=(m < length)[:, None] & inside, other=0.0)
            a = tl.load(pool + at[None, :] + k[:, None], mask=inside[:, None] & (j < rank), other=0.0)
            a = a.to(xs.dtype)
            if UPCAST:
                xs, a = xs.to(tl.float32), a.to(tl.float32)
            total = tl.dot(xs, a, total, input_precision="ieee")
        total *= vector(pool, rows, factors, j, rank, 1.0)[None, :]
        place = (split * N + row)[:, None] * R + j
        tl.store(low + place, total, mask=(m < length)[:, None] & (j < rank))


@kernel("T", "WIDTH/BN")
def expand(
    y: Ptr,
    low: Ptr,
    pool: Ptr,
    rows: Ptr,
    table: Ptr,
    scales: Ptr,
    segments: Ptr,
    bias: Ptr,
    result: Ptr,
    T: Int,
    N: Int,
    R: Int,
    WIDTH: Int,
    LINE: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    BIASED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """y' `[N, WIDTH]`, every row by the one program that has its segment."""
    segment, tile = tl.program_id(0), tl.program_id(1)
    start = tl.load(segments + segment * 3)
    length = tl.load(segments + segment * 3 + 1)
    adapter = tl.load(segments + segment * 3 + 2)
    used = (length > 0) & (adapter >= 0)
    line = table + adapter.to(tl.int64) * LINE
    first = tl.load(line + FIRST_B, mask=used, other=0)
    rank = tl.load(line + RANK, mask=used, other=0)
    scale = tl.load(scales + adapter, mask=used, other=0.0)
    m, n, r = tl.arange(0, BM), tile * BN + tl.arange(0, BN), tl.arange(0, BR)
    inside, live = n < WIDTH, m < length
    if length > 0:
        row = (start + m).to(tl.int64)
        total = tl.zeros((BM, BN), tl.float32)
        for j0 in range(0, rank, BR):
            j = j0 + r
            at = tl.load(rows + first + j, mask=j < rank, other=0) * WIDTH
            b = tl.load(pool + at[:, None] + n, mask=(j < rank)[:, None] & inside, other=0.0)
            if UPCAST:
                b = b.to(tl.float32)
            part = tl.zeros((BM, BR), tl.float32)
            for split in tl.static_range(SPLITS):
                place = (split * N + row)[:, None] * R + j
                part += tl.load(low + place, mask=live[:, None] & (j < rank), other=0.0)
            total = tl.dot(part.to(b.dtype), b, total, input_precision="ieee")
        place, kept = row[:, None] * WIDTH + n, live[:, None] & inside
        value = tl.load(y + place, mask=kept, other=0.0).to(tl.float32)
        output, own = tl.load(line + OUTPUT, mask=used, other=-1), tl.load(line + BIAS, mask=used, other=-1)
        if BIASED:
            changes = inside & ((output >= 0) | (own >= 0))
            value -= tl.load(bias + n, mask=changes, other=0.0).to(tl.float32)
        value += scale * total * vector(pool, rows, tl.load(line + OUT, mask=used, other=-1), n, WIDTH, 1.0)
        value *= vector(pool, rows, output, n, WIDTH, 1.0)
        value += vector(pool, rows, own, n, WIDTH, 0.0)
        if BIASED:
            value += tl.load(bias + n, mask=inside & (output >= 0) & (own < 0), other=0.0).to(tl.float32)
        tl.store(result + place, value.to(result.dtype.element_ty), mask=kept)


@kernel()
def vector(pool: Ptr, rows: Ptr, place: Int, n: Tile, width: Int, missing: Float) -> Tile:
    """Numbers n of the row of the pool that stands at `place` in `rows`; `missing` where that is −1."""
    at = tl.load(rows + place, mask=place >= 0, other=0) * width
    return tl.load(pool + at + n, mask=(n < width) & (place >= 0), other=missing).to(tl.float32)


@kernel("T", "IN/BN")
def scale_rows(
    x: Ptr,
    pool: Ptr,
    rows: Ptr,
    table: Ptr,
    segments: Ptr,
    result: Ptr,
    T: Int,
    IN: Int,
    LINE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """u ⊙ x `[n, IN]`, x where there is no u."""
    segment, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    start = tl.load(segments + segment * 3)
    length = tl.load(segments + segment * 3 + 1)
    adapter = tl.load(segments + segment * 3 + 2)
    used = (length > 0) & (adapter >= 0)
    place = tl.load(table + adapter.to(tl.int64) * LINE + INPUT, mask=used, other=-1)
    m = tl.arange(0, BM)
    at, kept = (start + m).to(tl.int64)[:, None] * IN + n, (m < length)[:, None] & (n < IN)
    value = tl.load(x + at, mask=kept, other=0.0).to(tl.float32) * vector(pool, rows, place, n, IN, 1.0)
    tl.store(result + at, value.to(result.dtype.element_ty), mask=kept)


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    pool: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    segments: torch.Tensor,
    max_rank: int,
) -> torch.Tensor:
    """`multi_adapter.reference` by the two kernels; no adapter in `segments` has a rank above `max_rank`."""
    count, width = len(x), -(-max_rank // RANKS) * RANKS
    low, result = x.new_empty(SPLITS, count, width, dtype=torch.float32), torch.empty_like(y)
    same: dict[str, Any] = {
        "pool": pool, "rows": rows, "table": table, "segments": segments, "low": low, "T": len(segments), "N": count,
        "R": width, "LINE": table.shape[1], "BM": ROWS, "BR": RANKS, "SPLITS": SPLITS,
        "UPCAST": x.device.type == "cpu",
    }  # fmt: skip
    shrink.launch(x=x, IN=x.shape[1], BK=INNER, **same, warps=2)
    expand.launch(
        y=y, scales=scales, bias=y if bias is None else bias, result=result, WIDTH=y.shape[1], BN=COLUMNS,
        BIASED=bias is not None, **same,
    )  # fmt: skip
    return result


def launch_scale(
    x: torch.Tensor, pool: torch.Tensor, rows: torch.Tensor, table: torch.Tensor, segments: torch.Tensor
) -> torch.Tensor:
    """`multi_adapter.reference_scale` by the kernel."""
    result = torch.empty_like(x)
    scale_rows.launch(
        x=x, pool=pool, rows=rows, table=table, segments=segments, result=result, T=len(segments), IN=x.shape[1],
        LINE=table.shape[1], BM=ROWS, BN=COLUMNS,
    )  # fmt: skip
    return result


def _variants(dtype: str) -> tuple[Variant, ...]:
    tiles: dict[str, int | bool] = {"LINE": packed.WIDTH, "BM": ROWS, "BR": RANKS, "SPLITS": SPLITS, "UPCAST": False}
    found, wide = "*i64 *i64", frozenset({"IN", "WIDTH", "R"})
    return (
        Variant(
            shrink, dtype, f"*{dtype} *{dtype} {found} *i32 *fp32 i32 i32 i32 i32", {**tiles, "BK": INNER},
            warps=2, divisible=wide - {"WIDTH"},
        ),
        Variant(
            expand, dtype, f"*{dtype} *fp32 *{dtype} {found} *fp32 *i32 *{dtype} *{dtype} i32 i32 i32 i32",
            {**tiles, "BN": COLUMNS, "BIASED": True}, divisible=wide - {"IN"},
        ),
        Variant(
            scale_rows, dtype, f"*{dtype} *{dtype} {found} *i32 *{dtype} i32 i32",
            {"LINE": packed.WIDTH, "BM": ROWS, "BN": COLUMNS}, divisible=frozenset({"IN"}),
        ),
    )  # fmt: skip


VARIANTS = (*_variants("fp16"), *_variants("bf16"), *_variants("fp32"))
