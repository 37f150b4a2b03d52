"""NF4 and FP4 codes to weights on a GPU.

    w[i] = book[code_i] · absmax[i // 64],   absmax[j] = map[absmax_code_j] · scale[j // 256] + offset if nested

The layout is bitsandbytes' (`surgeon.numerics`): two codes in a byte, the even index in the high nibble, blocks running
over the flattened weight. The products are in fp32 and rounded once, so the weights are those of the reference bit for
bit; a nested absmax may differ in its last bit, where the compiler fuses the product and the sum.

Tiles: a program decodes R blocks of 64, a tile `[R, 32]` of bytes with one absmax per row. Both nibbles come from one
shift by 4 and 0 along a third axis of two, which reshapes to `[R, 64]` in the order of memory, and the book is gathered
from 16 registers: no table is read from memory. It moves 0.5 bytes in and 2 out per weight and is bound by memory.

Replaces: `surgeon.numerics.dequantise_4bit`, 4 passes over the weight in torch. Library: bitsandbytes'
`dequantize_4bit`.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.kernels.aot import Variant
from surgeon.kernels.jit import Int, Ptr, Tile, kernel, missing
from surgeon.kernels.operators import operator
from surgeon.numerics import BLOCK, BOOKS, FourBit, Nested, dequantise_4bit, dynamic_map

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = 32


@kernel()
def book_values(byte: Tile, book: Ptr, ROWS: tl.constexpr, BYTES: tl.constexpr) -> Tile:
    """Bytes `[ROWS, BYTES]` → the values of their codes `[ROWS, 2 · BYTES]`, high nibbles first, fp32."""
    shift = 4 - 4 * tl.arange(0, 2)
    code = (byte.to(tl.int32)[:, :, None] >> shift[None, None, :]) & 15
    values = tl.gather(tl.load(book + tl.arange(0, 16)), tl.reshape(code, (ROWS * BYTES * 2,)), 0)
    return tl.reshape(values, (ROWS, BYTES * 2))


@kernel()
def block_scales(
    absmax: Ptr, scale: Ptr, offset: Ptr, dynamic: Ptr, block: Tile, mask: Tile, NESTED: tl.constexpr
) -> Tile:
    """absmax of the blocks, fp32; 256 of them share a scale where they are quantised too."""
    found = tl.load(absmax + block, mask=mask, other=0)
    if NESTED:
        value = tl.load(dynamic + found.to(tl.int32), mask=mask, other=0.0)
        found = value * tl.load(scale + block // 256, mask=mask, other=0.0) + tl.load(offset)
    return found


@kernel("blocks/ROWS")
def nf4_dequantise_kernel(
    codes: Ptr, absmax: Ptr, scale: Ptr, offset: Ptr, dynamic: Ptr, book: Ptr, weight: Ptr, count: Int, blocks: Int,
    NESTED: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """A program decodes ROWS blocks."""
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte_at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    byte = tl.load(codes + byte_at, mask=2 * byte_at < count, other=0)
    factor = block_scales(absmax, scale, offset, dynamic, block, block < blocks, NESTED)
    values = book_values(byte, book, ROWS, 32) * factor[:, None]
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(weight + at, values.to(weight.dtype.element_ty), mask=at < count)


def stored(
    codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, out: int, inp: int, kind: str
) -> FourBit:
    """The tensors of a 4-bit weight `[out, inp]` as one."""
    nested = None if scale is None or offset is None else Nested(scale, offset)
    return FourBit(codes, absmax, (out, inp), kind, nested)


def reference(weight: FourBit, dtype: torch.dtype) -> Tensor:
    """`surgeon.numerics.dequantise_4bit`."""
    return dequantise_4bit(weight, dtype)


def can_use(weight: FourBit, dtype: torch.dtype) -> str:
    """Why the kernel does not decode a weight, "" if it does."""
    if weight.block != BLOCK:
        return f"blocks of {weight.block}, not {BLOCK}"
    if dtype not in DTYPES:
        return f"weights in {dtype}"
    if math.prod(weight.shape) >= 2**31:
        return "more than 2³¹ weights"
    if not weight.codes.is_contiguous():
        return "codes that are not contiguous"
    return missing()


def launch(weight: FourBit, dtype: torch.dtype) -> Tensor:
    """The weight `[out, inp]` in `dtype`."""
    made = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    nf4_dequantise_kernel.launch(
        **parts(weight), weight=made, count=made.numel(), blocks=weight.absmax.numel(), ROWS=ROWS, warps=4
    )
    return made


def parts(weight: FourBit) -> dict[str, Any]:
    """The arguments of a kernel that stand for a weight; what is not there is stood for by absmax, and not read."""
    dynamic, book = _tables(weight.codes.device, weight.kind)
    nested = weight.nested
    return {
        "codes": weight.codes, "absmax": weight.absmax, "book": book, "dynamic": dynamic, "NESTED": nested is not None,
        "scale": nested.scale if nested else weight.absmax, "offset": nested.offset if nested else weight.absmax,
    }  # fmt: skip


@functools.cache
def _tables(device: torch.device, kind: str) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return dynamic_map().to(device), torch.tensor(BOOKS[kind], dtype=torch.float32, device=device)


nf4_dequantise = operator(
    "nf4_dequantise(Tensor codes, Tensor absmax, Tensor? scale, Tensor? offset, int out, int inp, str kind, "
    "ScalarType dtype) -> Tensor",
    launch=lambda *weight_and_dtype: launch(stored(*weight_and_dtype[:-1]), weight_and_dtype[-1]),
    reference=lambda *weight_and_dtype: reference(stored(*weight_and_dtype[:-1]), weight_and_dtype[-1]),
    fake=lambda codes, absmax, scale, offset, out, inp, kind, dtype: codes.new_empty((out, inp), dtype=dtype),
)
"""The weight `[out, inp]` of 4-bit codes."""


def _variant(dtype: str, nested: bool) -> Variant:
    signature = f"*fp32 *fp32 *{dtype} i32 i32"
    first = "*u8 *u8 *fp32 *fp32" if nested else "*u8 *fp32 *fp32 *fp32"
    label = f"{dtype}-nested" if nested else dtype
    constants = {"NESTED": nested, "ROWS": ROWS}
    return Variant(nf4_dequantise_kernel, label, f"{first} {signature}", constants, 4, 2, frozenset({"count"}))


VARIANTS = tuple(_variant(dtype, nested) for dtype in ("fp16", "bf16") for nested in (True, False))
