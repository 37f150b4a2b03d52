"""The kernels for many adapters over one batch; `surgeon.kernels.multi_adapter` tells what they work on.

    shrink   low[split, i, j] = Σ over the split's share of k of x[i, k] · A_a[j, k]     a program: 16 rows, 16 ranks
    expand   y'[i, :] = s_a ⊙ (y[i, :] + scale_a · Σ_j low[i, j] B_a[j, :]) + bias_a     a program: 16 rows, BN outputs

A segment has at most 16 rows, all of one adapter, so one row tile is one adapter: the smallest that a tensor core
multiplies, and decode (segments of one or two rows) wastes rows but reads every page once, which is what it is bound
by. Pages are gathered 16 at a time through the row table, ranks above the adapter's own masked to 0: the inner
dimension of every product is at least 16 whatever the rank.

The output of shrink is narrow, so its inner dimension is split over programs to fill a GPU; every split writes a place
of its own and expand adds them up in order. Nothing is added in memory: the same batch gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from surgeon.kernels.aot import Variant
from surgeon.kernels.jit import Int, Ptr, kernel

if TYPE_CHECKING:
    import triton.language as tl

ROWS, RANKS, INNER, COLUMNS, SPLITS = 16, 16, 128, 128, 4
"""Tile of rows, of ranks, of inputs and of outputs, and the splits of the inputs: the same for every batch, so that a
row's bits do not depend on what else is in it."""


@kernel("T", "R/BR", "SPLITS")
def shrink(
    x: Ptr,
    a_rows: Ptr,
    rows: Ptr,
    adapters: Ptr,
    order: Ptr,
    segments: Ptr,
    low: Ptr,
    T: Int,
    N: Int,
    R: Int,
    IN: Int,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    ORDERED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """low `[SPLITS, N, R]` fp32, rows in the order of the segments."""
    segment, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tl.load(segments + segment * 3)
    length = tl.load(segments + segment * 3 + 1)
    adapter = tl.load(segments + segment * 3 + 2)
    used = (length > 0) & (adapter >= 0)
    first = tl.load(adapters + adapter * 5, mask=used, other=0)
    rank = tl.load(adapters + adapter * 5 + 1, mask=used, other=0)
    m, j = tl.arange(0, BM), tile * BR + tl.arange(0, BR)
    if tile * BR < rank:
        position = start + m
        row = position
        if ORDERED:
            row = tl.load(order + position, mask=m < length, other=0)
        page = tl.load(rows + first + j, mask=j < rank, other=0).to(tl.int64)
        total = tl.zeros((BM, BR), tl.float32)
        for k0 in range(split * BK, IN, SPLITS * BK):
            k = k0 + tl.arange(0, BK)
            inside = k < IN
            xs = tl.load(x + row.to(tl.int64)[:, None] * IN + k, mask=(m < length)[:, None] & inside, other=0.0)
            a = tl.load(a_rows + page[None, :] * IN + k[:, None], mask=inside[:, None] & (j < rank), other=0.0)
            a = a.to(xs.dtype)
            if UPCAST:
                xs, a = xs.to(tl.float32), a.to(tl.float32)
            total = tl.dot(xs, a, total, input_precision="ieee")
        at = (split * N + position).to(tl.int64)[:, None] * R + j
        tl.store(low + at, total, mask=(m < length)[:, None] & (j < rank))


@kernel("T", "OUT/BN")
def expand(
    y: Ptr,
    low: Ptr,
    b_rows: Ptr,
    rows: Ptr,
    adapters: Ptr,
    scales: Ptr,
    order: Ptr,
    segments: Ptr,
    bias: Ptr,
    result: Ptr,
    T: Int,
    N: Int,
    R: Int,
    OUT: Int,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    ORDERED: tl.constexpr,
    BIASED: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """y' `[N, OUT]`, every row by the one program that has its segment."""
    segment, tile = tl.program_id(0), tl.program_id(1)
    start = tl.load(segments + segment * 3)
    length = tl.load(segments + segment * 3 + 1)
    adapter = tl.load(segments + segment * 3 + 2)
    used = (length > 0) & (adapter >= 0)
    first = tl.load(adapters + adapter * 5, mask=used, other=0)
    rank = tl.load(adapters + adapter * 5 + 1, mask=used, other=0)
    output = tl.load(adapters + adapter * 5 + 3, mask=used, other=-1)
    own = tl.load(adapters + adapter * 5 + 4, mask=used, other=-1)
    scale = tl.load(scales + adapter, mask=used, other=0.0)
    m, n, r = tl.arange(0, BM), tile * BN + tl.arange(0, BN), tl.arange(0, BR)
    inside, live = n < OUT, m < length
    if length > 0:
        position = start + m
        row = position
        if ORDERED:
            row = tl.load(order + position, mask=live, other=0)
        total = tl.zeros((BM, BN), tl.float32)
        for j0 in range(0, rank, BR):
            j = j0 + r
            page = tl.load(rows + first + j, mask=j < rank, other=0).to(tl.int64)
            b = tl.load(b_rows + page[:, None] * OUT + n, mask=(j < rank)[:, None] & inside, other=0.0)
            if UPCAST:
                b = b.to(tl.float32)
            part = tl.zeros((BM, BR), tl.float32)
            for split in tl.static_range(SPLITS):
                at = (split * N + position).to(tl.int64)[:, None] * R + j
                part += tl.load(low + at, mask=live[:, None] & (j < rank), other=0.0)
            total = tl.dot(part.to(b.dtype), b, total, input_precision="ieee")
        place, kept = row.to(tl.int64)[:, None] * OUT + n, live[:, None] & inside
        value = tl.load(y + place, mask=kept, other=0.0).to(tl.float32) + scale * total
        factor = tl.load(b_rows + output.to(tl.int64) * OUT + n, mask=inside & (output >= 0), other=1.0)
        value *= factor.to(tl.float32)
        value += tl.load(b_rows + own.to(tl.int64) * OUT + n, mask=inside & (own >= 0), other=0.0).to(tl.float32)
        if BIASED:
            value += tl.load(bias + n, mask=inside & (own < 0), other=0.0).to(tl.float32)
        tl.store(result + place, value.to(result.dtype.element_ty), mask=kept)


@kernel("T", "IN/BN")
def scale_rows(
    x: Ptr,
    a_rows: Ptr,
    adapters: Ptr,
    order: Ptr,
    segments: Ptr,
    result: Ptr,
    T: Int,
    IN: Int,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ORDERED: tl.constexpr,
) -> None:
    """u_a ⊙ x `[n, IN]`, x where there is no u."""
    segment, n = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    start = tl.load(segments + segment * 3)
    length = tl.load(segments + segment * 3 + 1)
    adapter = tl.load(segments + segment * 3 + 2)
    page = tl.load(adapters + adapter * 5 + 2, mask=(length > 0) & (adapter >= 0), other=-1)
    m, inside = tl.arange(0, BM), n < IN
    row = start + m
    if ORDERED:
        row = tl.load(order + row, mask=m < length, other=0)
    place, kept = row.to(tl.int64)[:, None] * IN + n, (m < length)[:, None] & inside
    factor = tl.load(a_rows + page.to(tl.int64) * IN + n, mask=inside & (page >= 0), other=1.0).to(tl.float32)
    value = tl.load(x + place, mask=kept, other=0.0).to(tl.float32) * factor
    tl.store(result + place, value.to(result.dtype.element_ty), mask=kept)


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    a_rows: torch.Tensor,
    b_rows: torch.Tensor,
    rows: torch.Tensor,
    adapters: torch.Tensor,
    scales: torch.Tensor,
    order: torch.Tensor | None,
    segments: torch.Tensor,
    bias: torch.Tensor | None,
    max_rank: int,
) -> torch.Tensor:
    """`multi_adapter.reference` by the two kernels; rows in no segment are left as they come."""
    count, width = len(x), -(-max_rank // RANKS) * RANKS
    low, result = x.new_empty(SPLITS, count, width, dtype=torch.float32), torch.empty_like(y)
    same: dict[str, Any] = {
        "rows": rows, "adapters": adapters, "order": segments if order is None else order, "segments": segments,
        "low": low, "T": len(segments), "N": count, "R": width, "BM": ROWS, "BR": RANKS, "SPLITS": SPLITS,
        "ORDERED": order is not None, "UPCAST": x.device.type == "cpu",
    }  # fmt: skip
    shrink.launch(x=x, a_rows=a_rows, IN=x.shape[1], BK=INNER, **same, warps=2)
    expand.launch(
        y=y, b_rows=b_rows, scales=scales, bias=y if bias is None else bias, result=result, OUT=y.shape[1],
        BN=COLUMNS, BIASED=bias is not None, **same,
    )  # fmt: skip
    return result


def launch_scale(
    x: torch.Tensor, a_rows: torch.Tensor, adapters: torch.Tensor, order: torch.Tensor | None, segments: torch.Tensor
) -> torch.Tensor:
    """`multi_adapter.scale_inputs` by the kernel."""
    result = torch.empty_like(x)
    scale_rows.launch(
        x=x, a_rows=a_rows, adapters=adapters, order=segments if order is None else order, segments=segments,
        result=result, T=len(segments), IN=x.shape[1], BM=ROWS, BN=COLUMNS, ORDERED=order is not None,
    )  # fmt: skip
    return result


def _variants(dtype: str) -> tuple[Variant, ...]:
    tiles: dict[str, int | bool] = {"BM": ROWS, "BR": RANKS, "SPLITS": SPLITS, "ORDERED": True, "UPCAST": False}
    ints, wide = "*i32 *i32", frozenset({"IN", "OUT", "R"})
    return (
        Variant(
            shrink, dtype, f"*{dtype} *{dtype} {ints} {ints} *fp32 i32 i32 i32 i32", {**tiles, "BK": INNER},
            warps=2, divisible=wide - {"OUT"},
        ),
        Variant(
            expand, dtype,
            f"*{dtype} *fp32 *{dtype} {ints} *fp32 {ints} *{dtype} *{dtype} i32 i32 i32 i32",
            {**tiles, "BN": COLUMNS, "BIASED": True}, divisible=wide - {"IN"},
        ),
        Variant(
            scale_rows, dtype, f"*{dtype} *{dtype} *i32 {ints} *{dtype} i32 i32",
            {"BM": ROWS, "BN": COLUMNS, "ORDERED": True}, divisible=frozenset({"IN"}),
        ),
    )  # fmt: skip


VARIANTS = (*_variants("fp16"), *_variants("bf16"), *_variants("fp32"))
