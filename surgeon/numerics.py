"""NF4 and FP4 with double quantisation, in plain torch: the reference for every kernel.

The layout is bitsandbytes' own, bit for bit, so that state dicts interchange (`surgeon.bitsandbytes_state`). Group-wise
integers are in `surgeon.numerics_int`, the packing of codes in `surgeon.packing`.

Dettmers et al. 2023, §3, and bitsandbytes, whose constants differ from the paper's equations: the printed equation 4
does not produce the published code book, and the second quantisation is not FP8 but an 8-bit map with a dynamic
exponent.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from surgeon.errors import UsageError
from surgeon.packing import pack_high_first, unpack_high_first

BLOCK = 64
NESTED_BLOCK = 256
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of N(0, 1), code 0 … 15: 8 positive ones between 0.5 and o, 7 negative ones, zero; o = 0.9677083."""
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = (*(x / 12 for x in _TWELFTHS), *(-x / 12 for x in _TWELFTHS))
"""Sign, two bits of exponent, one of mantissa, in order of the codes; the largest is 1."""
BOOKS = {"nf4": NF4, "fp4": FP4}
KINDS = tuple(BOOKS)
_CELLS = 2048
_CHUNK = 1 << 18  # elements at once, whole blocks: small enough to stay in cache


@dataclass(frozen=True)
class Nested:
    """What undoes the quantisation of absmax: absmax[i] ≈ map[code_i] · scale[i // 256] + offset.

    Attributes:
        scale: fp32 `[⌈blocks / 256⌉]`, the largest |absmax − offset| of each 256.
        offset: fp32 scalar, the mean of all absmax.
    """

    scale: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True)
class FourBit:
    """A tensor in 4-bit codes: w[i] ≈ book[code_i] · absmax[i // 64], i over the flattened tensor.

    Attributes:
        codes: uint8 `[⌈n / 2⌉]`, the even index in the high nibble.
        absmax: fp32 `[⌈n / 64⌉]`, or uint8 codes of it if `nested`.
        shape: of the tensor.
        kind: "nf4" or "fp4".
        nested: of the double quantisation, None without.
        block: elements per absmax.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, ...]
    kind: str = "nf4"
    nested: Nested | None = None
    block: int = BLOCK

    @property
    def bits(self) -> float:
        """Bits per element, the one offset of the tensor left out: 4.5, or 4.127 with double quantisation."""
        stored = 8 * (self.codes.numel() + self.absmax.numel() * self.absmax.itemsize)
        stored += 32 * self.nested.scale.numel() if self.nested else 0
        return stored / math.prod(self.shape)


@functools.cache
def code_book(kind: str) -> torch.Tensor:
    """The 16 values of the codes, fp32.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in BOOKS:
        raise UsageError(f"there is no 4-bit type '{kind}'", "", f"one of {', '.join(KINDS)}")
    return torch.tensor(BOOKS[kind], dtype=torch.float32)


@functools.cache
def thresholds(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The 15 midpoints between the values in ascending order, and the codes of the 16 values in that order."""
    book = code_book(kind)
    order = torch.argsort(book, stable=True)
    return (book[order[:-1]] + book[order[1:]]) / 2, order.to(torch.uint8)


def quantise_4bit(weight: torch.Tensor, kind: str = "nf4", *, double: bool = False, block: int = BLOCK) -> FourBit:
    """code = the nearest of the book to w / absmax over 64 consecutive elements; ties go down.

    The division is a product with 1 / absmax, but for a last block that is not full: bitsandbytes divides there, and
    the two may round differently. A block of zeros has absmax 0 and the code of 0.

    Args:
        weight: any shape and floating dtype, computed in fp32.
        kind: "nf4" or "fp4".
        double: quantise absmax too.
        block: elements per absmax.

    Raises:
        UsageError: a value is not finite.
    """
    made = [_quantised(part, kind, block) for part in weight.reshape(-1).split(_CHUNK)]
    packed, absmax = made[0] if len(made) == 1 else (torch.cat(parts) for parts in zip(*made, strict=True))
    _require_finite(absmax)
    if not double:
        return FourBit(packed, absmax, tuple(weight.shape), kind, None, block)
    stored, nested = quantise_absmax(absmax)
    return FourBit(packed, stored, tuple(weight.shape), kind, nested, block)


def _quantised(flat: torch.Tensor, kind: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and absmax of consecutive elements, of which only the last block may not be full."""
    blocks = _blocks(flat, block)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp_(-1, 1)
    if len(flat) % block:
        absmax[-1].clamp_(min=1e-38)
        scaled[-1] = (blocks[-1] / absmax[-1]).clamp_(-1, 1)
    return pack_high_first(nearest_codes(scaled.nan_to_num_(0.0).flatten()[: len(flat) + len(flat) % 2], kind)), absmax


def nearest_codes(scaled: torch.Tensor, kind: str) -> torch.Tensor:
    """Codes of values in [−1, 1], fp32 `[n]` → uint8 `[n]`: how many midpoints lie below, through the codes' order.

    No two midpoints lie in one of the cells that [−1, 1] is cut into, so one look-up and one comparison are enough:
    10 × faster than a search on a CPU, and the same to the last value, since a sum that rounds up into the next cell
    crosses no midpoint.
    """
    below, inside = (table.to(scaled.device) for table in _cells(kind))
    parts = []
    for part in scaled.split(_CHUNK):
        cell = (part + 1).mul_(_CELLS // 2).int()
        parts.append(torch.index_select(below, 0, cell).add_(part > torch.index_select(inside, 0, cell)))
    rank = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rank if kind == "nf4" else thresholds(kind)[1].to(scaled.device)[rank.int()]


@functools.cache
def _cells(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Per cell how many midpoints lie below it, uint8, and the one in it, infinity for none."""
    midpoints = thresholds(kind)[0]
    cell = (midpoints + 1).mul_(_CELLS // 2).int()
    inside = torch.full((_CELLS + 1,), torch.inf).index_put((cell,), midpoints)
    return torch.bucketize(torch.arange(_CELLS + 1), cell).to(torch.uint8), inside


def dequantise_4bit(stored: FourBit, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """book[code] · absmax, the product in fp32 and rounded once to `dtype`."""
    device = stored.codes.device
    book = torch.tensor(BOOKS[stored.kind], dtype=torch.float32, device=device)
    return scaled_by_block(book[unpack_high_first(stored.codes).int()], stored).to(dtype)


def scaled_by_block(values: torch.Tensor, stored: FourBit) -> torch.Tensor:
    """book[code] `[n or n + 1]`, which is changed, times the absmax of each block, in the shape of the tensor."""
    size = math.prod(stored.shape)
    absmax = stored.absmax if stored.nested is None else dequantise_absmax(stored.absmax, stored.nested)
    values = F.pad(values, (0, len(absmax) * stored.block - len(values))) if size % stored.block else values
    return values.view(-1, stored.block).mul_(absmax[:, None]).flatten()[:size].view(stored.shape)


def dynamic_map() -> torch.Tensor:
    """The 256 values of bitsandbytes' signed 8-bit type with a dynamic exponent, ascending, fp32.

    For e = 0 … 6 there are 2^e fractions, the midpoints of equal parts of [0.1, 1], times 10^(e−6), with both signs;
    and 0 and 1 (Dettmers 2016, §2.3).
    """
    return torch.tensor(_DYNAMIC, dtype=torch.float32)


def _dynamic_values() -> list[float]:
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        positive = (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += [*positive, *(-value for value in positive)]
    return sorted(values)


_DYNAMIC = _dynamic_values()


@functools.cache
def _nearest_of_grid() -> torch.Tensor:
    """Code of the map nearest to −1 + 2 k / 65535, for k = 0 … 65535, uint8."""
    book = dynamic_map()
    grid = torch.arange(65536, dtype=torch.float32) * (2 / 65535) - 1
    return torch.bucketize(grid, (book[:-1] + book[1:]) / 2).to(torch.uint8)


def quantise_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, Nested]:
    """Double quantisation: code = the nearest of `dynamic_map` to (absmax − mean) / scale, in blocks of 256.

    The nearest is looked up on a grid of 65536 points, as bitsandbytes does on a CPU (its GPU kernel compares with the
    midpoints; where the two differ, both codes are equally near to within 1.6e-5 of the scale).
    """
    offset = absmax.mean()
    blocks = _blocks(absmax - offset, NESTED_BLOCK)
    scale = blocks.abs().amax(1)
    scaled = blocks * (1.0 / scale)[:, None]
    point = ((scaled + 1.0) * 32767.5 + 0.5).nan_to_num(0.0).clamp_(0, 65535).long()
    codes = _nearest_of_grid().to(absmax.device)[point]
    codes[scale == 0] = 0
    return codes.flatten()[: absmax.numel()].contiguous(), Nested(scale, offset)


def dequantise_absmax(codes: torch.Tensor, nested: Nested) -> torch.Tensor:
    """map[code] · scale + offset, fp32 `[blocks]`."""
    values = dynamic_map().to(codes.device)[codes.int()]
    return values * nested.scale.repeat_interleave(NESTED_BLOCK)[: len(values)] + nested.offset


def _blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """The flattened values in rows of `block`, fp32, the last one padded with zeros."""
    flat = values.reshape(-1).float()
    return F.pad(flat, (0, -len(flat) % block)).view(-1, block)


def _require_finite(absmax: torch.Tensor) -> None:
    if not bool(torch.isfinite(absmax).all()):
        bad = int((~torch.isfinite(absmax)).sum())
        raise UsageError(
            f"{bad} block(s) hold values that are not finite", "", "the checkpoint is damaged: check where it came from"
        )
