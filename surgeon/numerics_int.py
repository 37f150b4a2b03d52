"""Group-wise integers of 2, 3, 4 and 8 bits, asymmetric or symmetric, in plain torch: the reference for every kernel.

    w[o, i] ≈ scale[o, i // g] · (code[o, i] − zero[o, i // g]),   0 <= code <= 2^N − 1

Storage is N + (bits of scale + bits of zero) / g bits per weight. A zero point in floating point is what makes a merge
exact: w + d with d constant over a group is zero' = zero − d / scale, with codes and scales untouched (Xu et al. 2024,
§3.3, where the offset β = −scale · zero is stored instead).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgeon.errors import UsageError
from surgeon.packing import BITS, pack, unpack

_CHUNK = 1 << 20  # weights at once: rows are independent, and small blocks stay in cache


@dataclass(frozen=True)
class Groups:
    """A weight `[out, in]` in integer codes, with one scale and one zero point per row and group of inputs.

    Attributes:
        codes: packed uint8 `[out, in · bits / 8]` (`surgeon.packing.pack`).
        scale: `[out, in / group]`.
        zero: `[out, in / group]`; whole numbers where they were quantised so, in the dtype of the scale all the same.
        bits: of a code.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Inputs per group."""
        return self.shape[1] // self.scale.shape[1]


def check_groups(inputs: int, group: int, bits: int) -> int:
    """The inputs per group, where −1 stands for all of them.

    Raises:
        UsageError: the inputs are no whole number of groups, a row no whole number of bytes, or there is no such width.
    """
    if bits not in BITS:
        raise UsageError(f"there are no codes of {bits} bits", "--bits", f"one of {', '.join(map(str, BITS))}")
    size = inputs if group == -1 else group
    if size < 1 or inputs % size:
        fitting = [g for g in (16, 32, 64, 128) if inputs % g == 0]
        hint = f"--group {fitting[-1]}" if fitting else "--group -1 (one group per row), or leave it out with --exclude"
        raise UsageError(f"{inputs} inputs are no whole number of groups of {group}", "", hint)
    if inputs * bits % 8:
        raise UsageError(f"{inputs} codes of {bits} bits do not fill whole bytes", "", "leave it out with --exclude")
    return size


def quantise_groups(
    weight: torch.Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = False,
    float_zero: bool = False,
    dtype: torch.dtype | None = None,
) -> Groups:
    """Min–max quantisation; the codes are those nearest to the weight for the scale and zero as they are stored.

    asymmetric, float zero:   scale = (max − min) / (2^N − 1),  zero = −min / scale
    asymmetric, integer zero: the same of the range widened to hold 0, zero rounded to 0 … 2^N − 1
    symmetric:                scale = max |w| / (2^(N−1) − 1),  zero = 2^(N−1), code 0 unused

    Args:
        weight: `[out, in]`; fp64 is computed in fp64, anything else in fp32.
        bits: N.
        group: inputs per group, −1 for a whole row.
        symmetric: see above.
        float_zero: see above; not with `symmetric`, whose zero points are one integer.
        dtype: of scale and zero; the dtype of the arithmetic if None.

    Raises:
        UsageError: see `check_groups`; or a value is not finite.
    """
    size = check_groups(weight.shape[1], group, bits)
    made: list[tuple[torch.Tensor, ...]] = []
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        groups = grouped(rows, size)
        scale, zero = range_of(groups, bits, symmetric=symmetric, float_zero=float_zero, dtype=dtype)
        codes = nearest_codes(groups, scale[..., None], zero[..., None], bits, lowest=1 if symmetric else 0)
        made.append((pack(codes.flatten(1), bits), scale, zero))
    packed, scale, zero = made[0] if len(made) == 1 else (torch.cat(parts) for parts in zip(*made, strict=True))
    return Groups(packed, scale, zero, bits)


def range_of(
    groups: torch.Tensor, bits: int, *, symmetric: bool, float_zero: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point `[..]` of groups `[.., g]`, see `quantise_groups`."""
    low, high = groups.amin(-1), groups.amax(-1)
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        hint = "the checkpoint is damaged: check where it came from"
        raise UsageError("the weight holds values that are not finite", "", hint)
    stored = dtype or groups.dtype
    if symmetric:
        half = 2 ** (bits - 1)
        scale = _no_zeros(torch.maximum(low.abs(), high.abs()) / (half - 1), stored)
        return scale, torch.full_like(scale, half)
    if not float_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = _no_zeros((high - low) / (2**bits - 1), stored)
    zero = -low / scale.to(low.dtype)
    if not float_zero:
        return scale, zero.round().clamp_(0, 2**bits - 1).to(stored)
    fits = torch.isfinite(zero.to(stored))  # a range far below the values has a zero point out of fp16's reach
    return torch.where(fits, scale, torch.ones_like(scale)), torch.where(fits, zero, -low).to(stored)


def nearest_codes(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, *, lowest: int = 0
) -> torch.Tensor:
    """round(w / scale + zero) within `lowest` … 2^N − 1, uint8; halves go to the even code."""
    scale, zero = scale.to(weight.dtype), zero.to(weight.dtype)
    return (weight / scale).add_(zero).round_().clamp_(lowest, 2**bits - 1).to(torch.uint8)


def dequantise_groups(stored: Groups, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """scale · (code − zero) `[out, in]`, computed in fp32, or in fp64 where `dtype` is, and rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return scaled_by_group(unpack(stored.codes, stored.bits).to(wide), stored).to(dtype)


def scaled_by_group(codes: torch.Tensor, stored: Groups) -> torch.Tensor:
    """scale · (code − zero) from unpacked codes `[out, in]` in floating point, which are changed."""
    values = grouped(codes, stored.group)
    return values.sub_(stored.zero.to(codes.dtype)[..., None]).mul_(stored.scale.to(codes.dtype)[..., None]).flatten(1)


def grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """`[out, in]` → `[out, in / group, group]`, in fp32 (fp64 stays fp64)."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    return wide.reshape(len(weight), weight.shape[1] // group, group)


def _no_zeros(scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """The scale as it is stored; 1 where it would be 0 (a group of equal values), so that it can be divided by."""
    rounded = scale.to(stored)
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)
