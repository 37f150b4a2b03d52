"""Codes to weights, fast: by a kernel on a GPU, on a CPU several codes per look-up.

The values are those of `surgeon.numerics`, bit for bit. torch copies elements of up to 16 bytes in one move when it
selects by an index, so on a CPU a byte of codes looks up all of its values at once: two fp32 as one complex64, four as
one complex128; and weights are made in pieces that stay in cache.
"""

from __future__ import annotations

import functools
import math

import torch

from surgeon import on_gpu
from surgeon.numerics import BLOCK, BOOKS, FourBit, dequantise_4bit, dequantise_absmax
from surgeon.numerics_int import Groups, dequantise_groups, scaled_by_group

_CHUNK = 8192 * BLOCK  # weights at once, whole blocks: what is between the codes and the weight stays in cache
_ELEMENT = {2: torch.complex64, 4: torch.complex128}


def is_traced(x: torch.Tensor) -> bool:
    """Whether x stands for a tensor while a graph is traced or compiled."""
    return torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor)


def decode_4bit(stored: FourBit, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `surgeon.numerics.dequantise_4bit` gives."""
    found = on_gpu.weight(stored, dtype)
    if found is not None:
        return found
    if stored.codes.device.type != "cpu" or is_traced(stored.codes):
        return dequantise_4bit(stored, dtype)
    absmax = stored.absmax if stored.nested is None else dequantise_absmax(stored.absmax, stored.nested)
    size, whole = math.prod(stored.shape), len(absmax) * stored.block
    made = torch.empty(whole, dtype=dtype)
    wide = torch.empty(min(whole, _CHUNK)) if dtype != torch.float32 else None
    pieces = (stored.codes.split(_CHUNK // 2), absmax.split(_CHUNK // stored.block), made.split(_CHUNK))
    for codes, scales, piece in zip(*pieces, strict=True):
        values = piece if wide is None else wide[: len(piece)]
        values[2 * len(codes) :] = 0
        _look_up(byte_values(stored.kind), codes, values[: 2 * len(codes)])
        values.view(-1, stored.block).mul_(scales[:, None])
        if wide is not None:
            piece.copy_(values)
    return made[:size].view(stored.shape)


def decode_groups(stored: Groups, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `surgeon.numerics_int.dequantise_groups` gives."""
    found = on_gpu.weight(stored, dtype)
    if found is not None:
        return found
    if stored.codes.device.type != "cpu" or is_traced(stored.codes):
        return dequantise_groups(stored, dtype)
    out, inp = stored.shape
    rows = min(out, max(1, _CHUNK // inp))
    made = torch.empty(out, inp, dtype=dtype)
    looked_up = stored.bits in (2, 4) and torch.float64 not in (dtype, stored.scale.dtype)
    wide = torch.empty(rows, inp) if looked_up and dtype != torch.float32 else None
    for start in range(0, out, rows):
        own = slice(start, start + rows)
        part = Groups(stored.codes[own], stored.scale[own], stored.zero[own], stored.bits)
        if not looked_up:
            made[own] = dequantise_groups(part, dtype)
            continue
        values = made[own] if wide is None else wide[: len(part.codes)]
        _look_up(_integers(stored.bits), part.codes.flatten(), values.view(-1))
        scaled_by_group(values, part)
        if wide is not None:
            made[own] = values
    return made


def _look_up(table: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
    """Rows of a table `[256, n]` of fp32, one after another, into `out`."""
    element = _ELEMENT[table.shape[1]]
    torch.index_select(table.view(element).flatten(), 0, codes.int(), out=out.view(element))


@functools.cache
def byte_values(kind: str) -> torch.Tensor:
    """The two values of each byte of 4-bit codes, the high nibble first."""
    book = torch.tensor(BOOKS[kind], dtype=torch.float32)
    return torch.stack([book.repeat_interleave(16), book.repeat(16)], -1)


@functools.cache
def _integers(bits: int) -> torch.Tensor:
    """The codes in each byte, the lowest bits first."""
    codes = torch.arange(256)[:, None] >> torch.arange(0, 8, bits)
    return (codes & (2**bits - 1)).float()
