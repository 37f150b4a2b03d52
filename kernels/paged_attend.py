"""The kernels of paged attention; what they compute and on what is told in `surgeon.kernels.paged_attention`.

One program has one segment, one K/V head and one split of the keys. Its tile of queries is the segment's rows times the
G query heads that share the K/V head, so that a key is read once for all of them: decode with G = 4 is a tile of 4
queries in the 16 rows that a tensor core multiplies, prefill with `tile` = 16 one of 64. Keys come BN slots at a time,
gathered through the block table, which is read once per slot and stays in cache. The softmax is taken as the keys go by
(running maximum and sum, in fp32).

Where there are few programs (decode), the keys are dealt out to SPLITS of them in turn, and `join` adds up what they
found in a fixed order: nothing is added in memory, and the number of splits depends on nothing but the call's shape.
A window skips the tiles of keys that no row of the segment sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from surgeon.kernels.aot import Variant
from surgeon.kernels.jit import Float, Int, Ptr, kernel

if TYPE_CHECKING:
    import triton.language as tl

KEYS, SPLITS, FULL = 64, 8, 64
"""Key slots in a tile; how many programs share the keys where there are fewer than `FULL` segments times heads."""
LEAST = -1.0e30
"""Stands for the score of a key that is not seen; −inf − −inf would be no number."""


@kernel("T", "KV", "SPLITS")
def attend(
    q: Ptr,
    k_pages: Ptr,
    v_pages: Ptr,
    blocks: Ptr,
    prefixes: Ptr,
    segments: Ptr,
    sinks: Ptr,
    result: Ptr,
    stats: Ptr,
    T: Int,
    N: Int,
    KV: Int,
    MOST: Int,
    KEY_PAGE: Int,
    VALUE_PAGE: Int,
    scale: Float,
    softcap: Float,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFIXED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """result `[SPLITS, N, H, DV]` and, with several splits, stats `[SPLITS, N, H, 2]`: maximum and sum."""
    head, split = tl.program_id(1), tl.program_id(2)
    entry = segments + tl.program_id(0) * 4
    start, length, request, position = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    prefix = 0
    if PREFIXED:
        prefix = tl.load(prefixes + request)
    m, n, d, dv = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    live = m // G < length
    row = (start + m // G).to(tl.int64) * (KV * G) + head * G + m % G
    here = position + m // G
    xs = tl.load(q + row[:, None] * D + d, mask=live[:, None] & (d < D), other=0.0)
    if UPCAST:
        xs = xs.to(tl.float32)
    padded = (prefix + PAGE - 1) // PAGE * PAGE
    leading = (padded + BN - 1) // BN
    last = (padded + position + length + BN - 1) // BN
    skipped = leading
    if WINDOW:
        skipped = tl.maximum(leading, (padded + position - WINDOW + 1) // BN)
    most = tl.full((BM,), LEAST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    found = tl.zeros((BM, BDV), tl.float32)
    if length > 0:
        for step in range(split, leading + last - skipped, SPLITS):
            slot = tl.where(step < leading, step, step - leading + skipped) * BN + n
            token = slot - padded
            inside = token < position + length
            page = tl.load(blocks + request * MOST + slot // PAGE, mask=inside, other=0)
            at = slot % PAGE * KV + head
            key, value = page.to(tl.int64) * KEY_PAGE + at * D, page.to(tl.int64) * VALUE_PAGE + at * DV
            sees = (token[None, :] >= 0) & (token[None, :] <= here[:, None])
            if WINDOW:
                sees = sees & (token[None, :] > here[:, None] - WINDOW)
            if PREFIXED:
                column = (slot < prefix)[None, :] & (here[:, None] >= 0)
                if WINDOW and WINDOWED:
                    column = column & ((slot - prefix)[None, :] > here[:, None] - WINDOW)
                sees = sees | column
            used = (slot < prefix) | ((token >= 0) & inside)
            ks = tl.load(k_pages + key[None, :] + d[:, None], mask=used[None, :] & (d < D)[:, None], other=0.0)
            vs = tl.load(v_pages + value[:, None] + dv, mask=used[:, None] & (dv < DV), other=0.0)
            ks, vs = ks.to(xs.dtype), vs.to(xs.dtype)
            scores = tl.dot(xs, ks, input_precision="ieee") * scale
            if CAPPED:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
            scores = tl.where(sees, scores, LEAST)
            fresh = tl.maximum(most, tl.max(scores, 1))
            weights = tl.where(sees, tl.exp(scores - fresh[:, None]), 0.0)
            shrunk = tl.exp(most - fresh)
            total = total * shrunk + tl.sum(weights, 1)
            found = tl.dot(weights.to(vs.dtype), vs, found * shrunk[:, None], input_precision="ieee")
            most = fresh
    kept = live[:, None] & (dv < DV)
    if SPLITS > 1:
        place = row + split.to(tl.int64) * N * (KV * G)
        tl.store(result + place[:, None] * DV + dv, found, mask=kept)
        tl.store(stats + place * 2, most, mask=live)
        tl.store(stats + place * 2 + 1, total, mask=live)
    else:
        if SINKS:
            sink = tl.load(sinks + head * G + m % G).to(tl.float32)
            fresh = tl.maximum(most, sink)
            found *= tl.exp(most - fresh)[:, None]
            total = total * tl.exp(most - fresh) + tl.exp(sink - fresh)
        found = found / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(result + row[:, None] * DV + dv, found.to(result.dtype.element_ty), mask=kept)


@kernel("N", "H")
def join(
    parts: Ptr,
    stats: Ptr,
    sinks: Ptr,
    result: Ptr,
    N: Int,
    H: Int,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """The splits of `attend` in one, `[N, H, DV]`: exp(m − max m) weighs each."""
    row, dv = tl.program_id(0).to(tl.int64) * H + tl.program_id(1), tl.arange(0, BDV)
    most = tl.full((1,), LEAST, tl.float32)
    total = tl.zeros((1,), tl.float32)
    found = tl.zeros((BDV,), tl.float32)
    if SINKS:
        most = tl.load(sinks + tl.program_id(1) + tl.arange(0, 1)).to(tl.float32)
        total = most * 0 + 1
    for split in tl.static_range(SPLITS):
        place = split * N.to(tl.int64) * H + row
        part = tl.load(parts + place * DV + dv, mask=dv < DV, other=0.0)
        high = tl.load(stats + place * 2 + tl.arange(0, 1))
        fresh = tl.maximum(most, high)
        found = found * tl.exp(most - fresh) + part * tl.exp(high - fresh)
        total = total * tl.exp(most - fresh) + tl.load(stats + place * 2 + 1 + tl.arange(0, 1)) * tl.exp(high - fresh)
        most = fresh
    found = found / tl.where(total > 0, total, 1.0)
    tl.store(result + row * DV + dv, found.to(result.dtype.element_ty), mask=dv < DV)


def longest(heads: int, kv: int, dtype: torch.dtype) -> int:
    """The longest segment whose queries are one tile: 64 queries, 16 in fp32, which no tensor core multiplies."""
    return max(1, (16 if dtype == torch.float32 else 64) * kv // heads)


def tiles(size: int, width: int, group: int, page: int, tile: int) -> dict[str, int]:
    """The constants that follow from shapes: d, d_v, query heads to a K/V head, tokens in a page, rows in a segment."""
    found = {"PAGE": page, "D": size, "DV": width, "BD": max(16, _power(size)), "BDV": max(16, _power(width))}
    return {**found, "G": group, "BM": max(16, _power(tile * group))}


def schedule(rows: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Key slots in a tile, and warps, for a tile of queries and of values: the most that no target has to spill."""
    if dtype == torch.float32:
        return min(32, KEYS), 8
    if width > 64 and (rows > 16 or width > 128):
        return min(32, KEYS), 8 if rows > 16 and width > 128 else 4
    return KEYS, 2 if rows == 16 and width <= 64 else 4


def _power(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    blocks: torch.Tensor,
    prefixes: torch.Tensor | None,
    segments: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    window: int,
    softcap: float,
    windowed: bool,
    tile: int,
) -> torch.Tensor:
    """`paged_attention.reference` by the two kernels; rows in no segment are 0."""
    count, heads, size = q.shape
    kv, width = v_pages.shape[2:]
    constants = tiles(size, width, heads // kv, k_pages.shape[1], tile)
    keys, warps = schedule(constants["BM"], constants["BDV"], q.dtype)
    splits = SPLITS if len(segments) * kv < FULL else 1
    result = q.new_zeros(count, heads, width)
    parts = q.new_zeros(splits, count, heads, width, dtype=torch.float32) if splits > 1 else result
    stats = q.new_zeros(splits, count, heads, 2, dtype=torch.float32) if splits > 1 else result
    extra = q if sinks is None else sinks
    attend.launch(
        q=q, k_pages=k_pages, v_pages=v_pages, blocks=blocks, prefixes=segments if prefixes is None else prefixes,
        segments=segments, sinks=extra, result=parts, stats=stats, T=len(segments), N=count, KV=kv,
        MOST=blocks.shape[1], KEY_PAGE=k_pages.stride(0), VALUE_PAGE=v_pages.stride(0), scale=float(scale),
        softcap=float(softcap), WINDOW=window, SPLITS=splits,
        PREFIXED=prefixes is not None, WINDOWED=windowed, CAPPED=bool(softcap), SINKS=sinks is not None,
        UPCAST=q.device.type == "cpu", BN=keys, **constants, warps=warps,
    )  # fmt: skip
    if splits > 1:
        join.launch(
            parts=parts, stats=stats, sinks=extra, result=result, N=count, H=heads, DV=width, SPLITS=splits,
            BDV=constants["BDV"], SINKS=sinks is not None, warps=1,
        )  # fmt: skip
    return result


def _variants(dtype: str, group: int, size: int, tile: int, splits: int, **more: int) -> tuple[Variant, ...]:
    constants = tiles(size, size, group, 16, tile)
    label = f"{dtype}-d{size}-g{group}-m{tile}-s{splits}" + "".join(f"-{name.lower()}{x}" for name, x in more.items())
    flags = {"WINDOW": 0, "PREFIXED": False, "WINDOWED": True, "CAPPED": False, "SINKS": False, "UPCAST": False, **more}
    found = "fp32" if splits > 1 else dtype
    keys, warps = schedule(constants["BM"], constants["BDV"], torch.float32 if dtype == "fp32" else torch.float16)
    return (
        Variant(
            attend, label,
            f"*{dtype} *{dtype} *{dtype} *i32 *i32 *i32 *{dtype} *{found} *{found} i32 i32 i32 i32 i32 i32 fp32 fp32",
            {**constants, **flags, "BN": keys, "SPLITS": splits}, warps=warps,
            divisible=frozenset({"KEY_PAGE", "VALUE_PAGE"}),
        ),
        Variant(
            join, label, f"*fp32 *fp32 *{dtype} *{dtype} i32 i32",
            {"DV": size, "BDV": constants["BDV"], "SPLITS": SPLITS, "SINKS": flags["SINKS"]}, warps=1,
        ),
    )[: 2 if splits > 1 else 1]  # fmt: skip


VARIANTS = (
    *_variants("fp16", 4, 128, 1, SPLITS),
    *_variants("fp16", 4, 128, 16, 1),
    *_variants("bf16", 1, 64, 16, 1, PREFIXED=True, WINDOW=1024, CAPPED=True, SINKS=True),
    *_variants("bf16", 8, 256, 1, SPLITS, PREFIXED=True, SINKS=True),
    *_variants("bf16", 8, 256, 8, 1),
    *_variants("bf16", 3, 64, 16, 1),
    *_variants("fp32", 4, 128, 4, 1),
    *_variants("fp32", 4, 64, 1, SPLITS),
)
