"""Codes to weights, fast on a CPU: several codes per look-up. The values are those of `surgeon.numerics`, bit for bit.

torch copies elements of up to 16 bytes in one move when it selects by an index, so a byte of codes looks up all of its
values at once: two fp32 as one complex64, four as one complex128.
"""

from __future__ import annotations

import functools

import torch

from surgeon.numerics import BOOKS, FourBit, dequantise_4bit, scaled_by_block
from surgeon.numerics_int import Groups, dequantise_groups, scaled_by_group

_ELEMENT = {2: torch.complex64, 4: torch.complex128}


def is_traced(x: torch.Tensor) -> bool:
    """Whether x stands for a tensor while a graph is traced or compiled."""
    return torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor)


def decode_4bit(stored: FourBit, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `surgeon.numerics.dequantise_4bit` gives."""
    if stored.codes.device.type != "cpu" or is_traced(stored.codes):
        return dequantise_4bit(stored, dtype)
    return scaled_by_block(_looked_up(byte_values(stored.kind), stored.codes), stored).to(dtype)


def decode_groups(stored: Groups, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What `surgeon.numerics_int.dequantise_groups` gives."""
    slow = stored.bits not in (2, 4) or stored.codes.device.type != "cpu" or is_traced(stored.codes)
    if slow or torch.float64 in (dtype, stored.scale.dtype):
        return dequantise_groups(stored, dtype)
    values = _looked_up(_integers(stored.bits), stored.codes.flatten()).view(stored.shape)
    return scaled_by_group(values, stored).to(dtype)


def _looked_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Rows of a table `[256, n]` of fp32, one after another."""
    element = _ELEMENT[table.shape[1]]
    found = torch.index_select(table.view(element).flatten(), 0, codes.int())
    return torch.view_as_real(found).flatten() if element == torch.complex64 else found.view(torch.float32)


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
