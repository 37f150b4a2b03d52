"""Products with weights in codes by packed CPU kernels: for inference, nothing is dequantised.

In bf16 a product that reads codes is 20 to 40 × faster than decoding the weight first for up to 4 tokens, where it is
faster than the same product with a bf16 weight too, and 5 to 9 × for 16 (benchmarks/packed.py). Two kernels exist:
torch's for group-wise integers of up to 4 bits, and bitsandbytes' for NF4 and FP4, where it is installed and the
processor has AVX-512 BF16. With more tokens, for 8 bits or other group sizes weights are decoded, and so they are in
fp32 and fp16, where torch's kernel is not vectorised: slower than decoding even for one token (7.5 ms beside 6.9 for
2,048 × 2,048), 12 × for 64.

Results are as near to the exact product as those of a decoded bf16 weight (2.5e-3 of their norm on normal weights), and
not the same bits. So these kernels run only inside `packed_products`, as generating, evaluating and serving do, and
never where surgeon verifies something. Every weight is compared with its decoded self once, when it is packed.
"""

from __future__ import annotations

import contextvars
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from surgeon.decode import decode_4bit, decode_groups
from surgeon.numerics import BLOCK, FourBit, code_book, dequantise_absmax
from surgeon.numerics_int import Groups
from surgeon.packing import unpack, unpack_high_first

Product = Callable[[Tensor], Tensor]
TOKENS = {FourBit: 128, Groups: 48}
"""Up to so many rows of x the packed product is faster than decoding and multiplying."""
GROUPS = (32, 64, 128, 256)
LANES = 32
ERROR = 0.02

_allowed: contextvars.ContextVar[bool] = contextvars.ContextVar("packed", default=False)
_known: Any = WeakTensorKeyDictionary()


@contextmanager
def packed_products(wanted: bool = True) -> Iterator[None]:
    """Within, linears over codes may use packed kernels; with False they decode, as they do outside."""
    before = _allowed.set(wanted)
    try:
        yield
    finally:
        _allowed.reset(before)


def product(x: Tensor, stored: FourBit | Groups) -> Tensor | None:
    """x Wᵀ in bf16 `[.., in]` → `[.., out]`, or None where the weight is to be decoded."""
    plain = _allowed.get() and x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled()
    rows = x.numel() // x.shape[-1] if plain else 0
    if not 0 < rows <= TOKENS[type(stored)]:
        return None
    made = _packed(stored)
    return None if made is None else made(x.reshape(rows, -1).contiguous()).view(*x.shape[:-1], -1)


def _packed(stored: FourBit | Groups) -> Product | None:
    """The packed product of a weight, made once as long as its codes live and stay."""
    parts = (stored.codes, stored.absmax) if isinstance(stored, FourBit) else (stored.codes, stored.scale, stored.zero)
    state = tuple((id(part), 0 if part.is_inference() else part._version) for part in parts)
    known = _known.get(stored.codes)
    if known is None or known[0] != state:
        with torch.autocast("cpu", enabled=False):
            known = (state, _checked(stored))
        _known[stored.codes] = known
    found: Product | None = known[1]
    return found


def _checked(stored: FourBit | Groups) -> Product | None:
    """The product, if there is a kernel and it computes what the decoded weight does."""
    made = _four_bit(stored) if isinstance(stored, FourBit) else _integers(stored)
    if made is None:
        return None
    x = torch.randn(1, stored.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = decode_4bit(stored) if isinstance(stored, FourBit) else decode_groups(stored)
    expected = x.float() @ weight.t()
    return made if float((made(x).float() - expected).norm()) <= ERROR * float(expected.norm()) else None


def _integers(stored: Groups) -> Product | None:
    """torch's kernel: w = scale (code - 8) + offset, scales and offsets in bf16.

    Fewer codes than 16 lie around 8, so that the offsets, and what is lost by rounding them, are small.
    """
    out, inp = stored.shape
    if stored.bits > 4 or stored.group not in GROUPS or out % LANES or inp % LANES:
        return None
    middle = 2 ** (stored.bits - 1)
    codes = unpack(stored.codes, stored.bits).int() + (8 - middle)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale, zero = stored.scale.float(), stored.zero.float()
    pairs = torch.stack([scale, scale * (middle - zero)], -1).transpose(0, 1).contiguous().bfloat16()
    return functools.partial(_by_torch, packed=packed, group=stored.group, pairs=pairs)


def _by_torch(x: Tensor, *, packed: Tensor, group: int, pairs: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, pairs)
    return result


def _four_bit(stored: FourBit) -> Product | None:
    """bitsandbytes' kernel: of 32 rows the two codes of every pair of columns, the first 32 in the low nibbles."""
    if len(stored.shape) != 2 or stored.block != BLOCK or not _has_bitsandbytes():
        return None
    out, inp = stored.shape
    if out % LANES or inp % BLOCK:
        return None
    codes = unpack_high_first(stored.codes).view(out // LANES, LANES, inp // 2, 2).transpose(1, 2).reshape(-1, 2, LANES)
    packed = (codes[:, 0] | codes[:, 1] << 4).view(out, inp // 2)
    absmax = stored.absmax if stored.nested is None else dequantise_absmax(stored.absmax, stored.nested)
    columns = absmax.view(out, inp // BLOCK).t().to(torch.bfloat16).contiguous()
    return functools.partial(
        _by_bitsandbytes, packed=packed, shape=[out, inp], absmax=columns, book=code_book(stored.kind)
    )


def _by_bitsandbytes(x: Tensor, *, packed: Tensor, shape: list[int], absmax: Tensor, book: Tensor) -> Tensor:
    result: Tensor = torch.ops.bitsandbytes.gemv_4bit(x, packed, shape, absmax, book, BLOCK)
    return result


@functools.cache
def _has_bitsandbytes() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    from bitsandbytes import functional

    return bool(getattr(functional, "has_avx512bf16", lambda: False)())
