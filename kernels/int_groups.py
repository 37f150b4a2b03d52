"""Group-wise integers of 2, 3, 4 and 8 bits to weights on a GPU.

    w[o, i] = scale[o, i // g] · (code[o, i] − zero[o, i // g]),   zero in floating point

The codes of a row are one little-endian stream of bits (`surgeon.packing`): a byte holds 4, 2 or 1 of them, three bytes
hold 8 of 3 bits. A tile of words `[rows, n]` becomes codes `[rows, n, per word]` by one shift along a third axis, which
reshapes to the order of memory: no code crosses a word, and no width needs a path of its own.

Tiles: BK columns hold whole groups, or a group whole tiles: scale and zero are read once for each, as `[rows, groups]`.
The products are in fp32 and rounded once: the weights of the reference bit for bit.

Replaces: `surgeon.numerics_int.dequantise_groups`, 5 passes over the weight in torch. Library: none with zero points in
floating point (GPTQ's and AWQ's kernels take integers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.kernels.aot import Variant
from surgeon.kernels.jit import Int, Ptr, Tile, kernel, missing
from surgeon.kernels.operators import operator
from surgeon.numerics_int import Groups, dequantise_groups

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 32


@kernel()
def words(codes: Ptr, n: Tile, begin: Int, N: Int, K: Int, BITS: tl.constexpr, BK: tl.constexpr) -> Tile:
    """The words of columns begin … begin + BK of rows n, int32 `[rows, BK / codes per word]`."""
    row = codes + n[:, None] * (K * BITS // 8)
    if BITS == 3:
        word = begin // 8 + tl.arange(0, BK // 8)[None, :]
        mask = (n[:, None] < N) & (8 * word < K)
        found = tl.load(row + 3 * word, mask=mask, other=0).to(tl.int32)
        found |= tl.load(row + 3 * word + 1, mask=mask, other=0).to(tl.int32) << 8
        found |= tl.load(row + 3 * word + 2, mask=mask, other=0).to(tl.int32) << 16
    else:
        per: tl.constexpr = 8 // BITS
        word = begin // per + tl.arange(0, BK // per)[None, :]
        found = tl.load(row + word, mask=(n[:, None] < N) & (per * word < K), other=0).to(tl.int32)
    return found


@kernel()
def int_values(
    codes: Ptr, scale: Ptr, zero: Ptr, n: Tile, begin: Int, N: Int, K: Int, group: Int,
    BITS: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
) -> Tile:  # fmt: skip
    """The weights `[ROWS, BK]` of rows n from column `begin` on, fp32; GROUPS of them in a tile, or a part of one."""
    per: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    shift = BITS * tl.arange(0, per)
    found = words(codes, n, begin, N, K, BITS, BK)
    code = (found[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)
    values = tl.reshape(code.to(tl.float32), (ROWS, GROUPS, BK // GROUPS))
    place = begin // group + tl.arange(0, GROUPS)
    at = n[:, None] * (K // group) + place[None, :]
    inside = (n[:, None] < N) & (place[None, :] < K // group)
    factor = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
    middle = tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
    return tl.reshape((values - middle[:, :, None]) * factor[:, :, None], (ROWS, BK))


@kernel("N/ROWS", "K/BK")
def int_dequantise_kernel(
    codes: Ptr, scale: Ptr, zero: Ptr, weight: Ptr, N: Int, K: Int, group: Int,
    BITS: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
) -> None:  # fmt: skip
    """A program decodes a tile `[ROWS, BK]`."""
    n, begin = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BK
    values = int_values(codes, scale, zero, n, begin, N, K, group, BITS, ROWS, BK, GROUPS)
    k = begin + tl.arange(0, BK)
    mask = (n[:, None] < N) & (k[None, :] < K)
    tl.store(weight + n[:, None] * K + k[None, :], values.to(weight.dtype.element_ty), mask=mask)


def reference(weight: Groups, dtype: torch.dtype) -> Tensor:
    """`surgeon.numerics_int.dequantise_groups`."""
    return dequantise_groups(weight, dtype)


def columns(group: int, most: int = 128) -> int:
    """BK: the largest power of two that holds whole groups, or of which a group holds several; 0 if there is none."""
    return next((size for size in (128, 64, 32, 16) if size <= most and (size % group == 0 or group % size == 0)), 0)


def can_use(weight: Groups, dtype: torch.dtype) -> str:
    """Why the kernel does not decode a weight, "" if it does."""
    if not columns(weight.group):
        return f"groups of {weight.group}, neither a power of two nor a multiple of 16"
    if dtype not in DTYPES or weight.scale.dtype not in DTYPES or weight.zero.dtype != weight.scale.dtype:
        return f"weights in {dtype} from scales in {weight.scale.dtype} and zero points in {weight.zero.dtype}"
    if weight.shape[0] * weight.shape[1] >= 2**31:
        return "more than 2³¹ weights"
    if not all(part.is_contiguous() for part in (weight.codes, weight.scale, weight.zero)):
        return "codes, scales or zero points that are not contiguous"
    return missing()


def parts(weight: Groups) -> dict[str, Any]:
    """The arguments of a kernel that stand for a weight."""
    size = columns(weight.group)
    return {
        "codes": weight.codes, "scale": weight.scale, "zero": weight.zero, "group": weight.group, "BITS": weight.bits,
        "BK": size, "GROUPS": max(1, size // weight.group),
    }  # fmt: skip


def launch(weight: Groups, dtype: torch.dtype) -> Tensor:
    """The weight `[out, in]` in `dtype`."""
    rows, inputs = weight.shape
    made = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    int_dequantise_kernel.launch(**parts(weight), weight=made, N=rows, K=inputs, ROWS=ROWS, warps=4)
    return made


int_dequantise = operator(
    "int_dequantise(Tensor codes, Tensor scale, Tensor zero, int bits, ScalarType dtype) -> Tensor",
    launch=lambda codes, scale, zero, bits, dtype: launch(Groups(codes, scale, zero, bits), dtype),
    reference=lambda codes, scale, zero, bits, dtype: reference(Groups(codes, scale, zero, bits), dtype),
    fake=lambda codes, scale, zero, bits, dtype: codes.new_empty(Groups(codes, scale, zero, bits).shape, dtype=dtype),
)
"""The weight `[out, in]` of group-wise integer codes."""


def _variant(bits: int, dtype: str, group: int) -> Variant:
    size = columns(group)
    constants = {"BITS": bits, "ROWS": ROWS, "BK": size, "GROUPS": max(1, size // group)}
    signature = f"*u8 *{dtype} *{dtype} *{dtype} i32 i32 i32"
    aligned = frozenset({"K", "group"})
    return Variant(int_dequantise_kernel, f"int{bits}-{dtype}-g{group}", signature, constants, 4, 2, aligned)


VARIANTS = tuple(
    _variant(bits, dtype, group) for bits in (3, 2, 4, 8) for dtype, group in (("bf16", 32), ("fp16", 128))
)
