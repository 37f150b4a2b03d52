"""x Wᵀ with W in group-wise integers, for few rows of x: decode, multiply, low-rank term and bias in one kernel.

    y = x Wᵀ + low upᵀ + bias,   W[n, k] = scale[n, k // g] · (code[n, k] − zero[n, k // g])

The codes are those of `surgeon.kernels.int_groups`, with zero points in floating point, which a merged QA-LoRA has (Xu
et al. 2024, §3.3). A program owns 64 rows of W and takes BK columns at a time, as `surgeon.kernels.nf4_matmul` does,
with the same reasons for the tile and for W on the left (`surgeon.kernels.coded_tiles`). Weights are multiplied out in
fp32 and rounded to the dtype of x.

Library: none with zero points in floating point; for integer ones GPTQ's Marlin kernels, which are CUDA and no
dependency here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon.kernels import int_groups
from surgeon.kernels.aot import Variant
from surgeon.kernels.coded_tiles import arguments, finish, transposed_rows, unfit
from surgeon.kernels.int_groups import int_values
from surgeon.kernels.jit import Int, Ptr, kernel
from surgeon.kernels.operators import operator
from surgeon.numerics_int import Groups, dequantise_groups

if TYPE_CHECKING:
    import triton.language as tl

ROWS = 64
OPTIONS = {"warps": 4, "stages": 3}


@kernel("N/BN", "M/BM")
def int_matmul_kernel(
    x: Ptr, codes: Ptr, scale: Ptr, zero: Ptr, bias: Ptr, low: Ptr, up: Ptr, y: Ptr,
    M: Int, N: Int, K: Int, R: Int, group: Int, x_m: Int,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr, BR: tl.constexpr,
    BIASED: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """A tile `[BN, BM]` of yᵀ."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BN, BM), tl.float32)
    for begin in range(0, K, BK):
        columns = transposed_rows(x, begin + tl.arange(0, BK), m, x_m, K, M, UPCAST)
        values = int_values(codes, scale, zero, n, begin, N, K, group, BITS, BN, BK, GROUPS)
        total = tl.dot(values.to(columns.dtype), columns, total, input_precision="ieee")
    finish(total, n, m, bias, low, up, y, N, M, R, BIASED, BR, UPCAST)


def reference(
    x: Tensor, weight: Groups, bias: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """The decoded weight and two products."""
    y = F.linear(x, dequantise_groups(weight, x.dtype), bias)
    return y if low is None or up is None else torch.addmm(y, low, up.t())


def can_use(
    x: Tensor, weight: Groups, bias: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None
) -> str:
    """Why the kernel does not multiply, "" if it does."""
    return int_groups.can_use(weight, x.dtype) or unfit(x, bias, low, up)


def launch(
    x: Tensor, weight: Groups, bias: Tensor | None = None, low: Tensor | None = None, up: Tensor | None = None
) -> Tensor:
    """y `[M, N]`."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    int_matmul_kernel.launch(**int_groups.parts(weight), **arguments(x, y, bias, low, up), BN=ROWS, **OPTIONS)
    return y


def _weight_first(function: Any) -> Any:
    """Takes the arguments of the operator: x and its terms, then the weight in parts."""
    return lambda x, bias, low, up, *weight: function(x, Groups(*weight), bias, low, up)


int_matmul = operator(
    "int_matmul(Tensor x, Tensor? bias, Tensor? low, Tensor? up, Tensor codes, Tensor scale, Tensor zero, int bits) "
    "-> Tensor",
    launch=_weight_first(launch),
    reference=_weight_first(reference),
    fake=lambda x, bias, low, up, codes, scale, zero, bits: x.new_empty(x.shape[0], codes.shape[0]),
)
"""y `[M, out]` for x `[M, in]`."""


def _variant(bits: int, dtype: str, rows: int, rank: int, group: int) -> Variant:
    kind, size = f"*{dtype}", int_groups.columns(group)
    tile = {"BM": rows, "BN": ROWS, "BK": size, "GROUPS": max(1, size // group)}
    constants = {"BITS": bits, "BR": rank, "BIASED": False, "UPCAST": False, **tile}
    return Variant(
        int_matmul_kernel, f"int{bits}-{dtype}-m{rows}-r{rank}-g{group}",
        f"{kind} *u8 {' '.join([kind] * 6)} i32 i32 i32 i32 i32 i32", constants, **OPTIONS,
        divisible=frozenset({"K", "group", "x_m"}),
    )  # fmt: skip


VARIANTS = tuple(
    _variant(bits, dtype, rows, rank, group)
    for bits in (3, 4, 2, 8)
    for dtype, rows, rank, group in (("bf16", 16, 16, 32), ("bf16", 32, 64, 128), ("fp16", 32, 0, 16))
)
