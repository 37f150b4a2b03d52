"""x Wᵀ with W in NF4 or FP4, for few rows of x: decode, multiply, low-rank term and bias in one kernel.

    y = x Wᵀ + low upᵀ + bias,   W[n, k] = book[code] · absmax[(n K + k) // 64]      (`surgeon.kernels.nf4`)

K is a multiple of 64, so that a block never crosses rows. A decode step reads every weight once, 4.5 bits of it: the
kernel is bound by memory for as long as M is small, and what counts is how many bytes are under way. A program owns 64
rows of W and takes BK = 128 columns at a time, two blocks, 4 KiB, three of them in flight; N = 4096 rows keep 768 KiB
under way.

The weights are multiplied out in fp32 and rounded to the dtype of x before the product, so that they are the weights
that `nf4_dequantise` gives, and a fused step computes what an unfused one does up to the order of the sum. See
`surgeon.kernels.coded_tiles` for why W is the left operand and for the low-rank term.

Library: bitsandbytes' `gemm_4bit` (from 0.50; its gemv before), without low-rank term.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.kernels import nf4
from surgeon.kernels.aot import Variant
from surgeon.kernels.coded_tiles import arguments, finish, transposed_rows, unfit
from surgeon.kernels.jit import Int, Ptr, kernel
from surgeon.kernels.nf4 import block_scales, book_values, stored
from surgeon.kernels.operators import operator
from surgeon.numerics import BLOCK, FourBit, dequantise_4bit

if TYPE_CHECKING:
    import triton.language as tl

TILES = {"BN": 64, "BK": 128}
OPTIONS = {"warps": 4, "stages": 3}


@kernel("N/BN", "M/BM")
def nf4_matmul_kernel(
    x: Ptr, codes: Ptr, absmax: Ptr, scale: Ptr, offset: Ptr, dynamic: Ptr, book: Ptr, bias: Ptr, low: Ptr, up: Ptr,
    y: Ptr, M: Int, N: Int, K: Int, R: Int, x_m: Int,
    NESTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    BIASED: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """A tile `[BN, BM]` of yᵀ."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BN, BM), tl.float32)
    for begin in range(0, K, BK):
        pair = begin // 2 + tl.arange(0, BK // 2)
        byte = tl.load(
            codes + n[:, None] * (K // 2) + pair[None, :], mask=(n[:, None] < N) & (2 * pair[None, :] < K), other=0
        )
        block = begin // 64 + tl.arange(0, BK // 64)
        inside = (n[:, None] < N) & (64 * block[None, :] < K)
        at = n[:, None] * (K // 64) + block[None, :]
        factor = block_scales(absmax, scale, offset, dynamic, at, inside, NESTED)
        values = tl.reshape(book_values(byte, book, BN, BK // 2), (BN, BK // 64, 64)) * factor[:, :, None]
        columns = transposed_rows(x, begin + tl.arange(0, BK), m, x_m, K, M, UPCAST)
        weight = tl.reshape(values, (BN, BK)).to(columns.dtype)
        total = tl.dot(weight, columns, total, input_precision="ieee")
    finish(total, n, m, bias, low, up, y, N, M, R, BIASED, BR, UPCAST)


def reference(
    x: Tensor, weight: FourBit, bias: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """The decoded weight and two products."""
    y = F.linear(x, dequantise_4bit(weight, x.dtype), bias)
    return y if low is None or up is None else torch.addmm(y, low, up.t())


def can_use(
    x: Tensor, weight: FourBit, bias: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None
) -> str:
    """Why the kernel does not multiply, "" if it does."""
    if weight.shape[1] % BLOCK:
        return f"{weight.shape[1]} columns, no multiple of {BLOCK}"
    return nf4.can_use(weight, x.dtype) or unfit(x, bias, low, up)


def launch(
    x: Tensor, weight: FourBit, bias: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """y `[M, N]`."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    nf4_matmul_kernel.launch(**nf4.parts(weight), **arguments(x, y, bias, low, up), **TILES, **OPTIONS)
    return y


def _weight_first(function: Any) -> Any:
    """Takes the arguments of the operator: x and its terms, then the weight in parts."""
    return lambda x, bias, low, up, *weight: function(x, stored(*weight), bias, low, up)


nf4_matmul = operator(
    "nf4_matmul(Tensor x, Tensor? bias, Tensor? low, Tensor? up, Tensor codes, Tensor absmax, Tensor? scale, "
    "Tensor? offset, int out, int inp, str kind) -> Tensor",
    launch=_weight_first(launch),
    reference=_weight_first(reference),
    fake=lambda x, bias, low, up, codes, absmax, scale, offset, out, inp, kind: x.new_empty(x.shape[0], out),
)
"""y `[M, out]` for x `[M, inp]`."""


def _variant(dtype: str, rows: int, rank: int, nested: bool, biased: bool = False) -> Variant:
    kind = f"*{dtype}"
    weight = "*u8 *u8 *fp32 *fp32 *fp32 *fp32" if nested else "*u8 *fp32 *fp32 *fp32 *fp32 *fp32"
    constants = {"NESTED": nested, "BM": rows, "BR": rank, "BIASED": biased, "UPCAST": False, **TILES}
    label = f"{dtype}-m{rows}-r{rank}{'-nested' if nested else ''}{'-bias' if biased else ''}"
    return Variant(
        nf4_matmul_kernel, label, f"{kind} {weight} {kind} {kind} {kind} {kind} i32 i32 i32 i32 i32", constants,
        **OPTIONS, divisible=frozenset({"K", "x_m"}),
    )  # fmt: skip


VARIANTS = (
    _variant("bf16", 16, 16, nested=True),
    _variant("bf16", 16, 0, nested=False, biased=True),
    _variant("fp16", 32, 64, nested=True),
    _variant("bf16", 32, 32, nested=False),
)
