"""Codes of a few bits in bytes: one little-endian stream of bits, the layout GPTQ, compressed-tensors and ONNX share.

Code i of b bits occupies bits b·i … b·i + b − 1 of the stream, the lowest first: at 4 bits the even index is in the low
nibble, at 2 bits four codes are in a byte, and at 3 bits eight codes are in three bytes (32 codes in three int32 words,
as GPTQ stores them). Read as int32 words on a little-endian machine the same bytes are GPTQ's and compressed-tensors'
words, as uint8 they are MatMulNBits'. NF4 and FP4 are the exception: bitsandbytes puts the even index in the high
nibble.
"""

from __future__ import annotations

import torch

from surgeon.errors import UsageError

BITS = (2, 3, 4, 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[.., n]` of `bits` bits, uint8 → bytes `[.., n · bits / 8]`, uint8.

    Raises:
        UsageError: a row of n codes does not fill whole bytes, or there is no such width.
    """
    count = codes.shape[-1]
    _check(bits, count * bits % 8 == 0, f"{count} codes of {bits} bits do not fill whole bytes")
    if bits == 8:
        return codes.contiguous()
    per = 8 if bits == 3 else 8 // bits
    lanes = codes.reshape(*codes.shape[:-1], count // per, per).to(torch.int32)
    word = lanes[..., 0].clone()
    for lane in range(1, per):
        word |= lanes[..., lane] << (bits * lane)
    if bits != 3:
        return word.to(torch.uint8)
    parts = torch.stack([word & 0xFF, (word >> 8) & 0xFF, (word >> 16) & 0xFF], -1)
    return parts.reshape(*codes.shape[:-1], count // 8 * 3).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: bytes `[.., m]` → codes `[.., m · 8 / bits]`, uint8."""
    _check(bits, bits != 3 or packed.shape[-1] % 3 == 0, f"{packed.shape[-1]} bytes are no codes of {bits} bits")
    if bits == 8:
        return packed
    if bits == 3:
        triples = packed.reshape(*packed.shape[:-1], packed.shape[-1] // 3, 3).to(torch.int32)
        word = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        lanes = [((word >> (3 * lane)) & 7).to(torch.uint8) for lane in range(8)]
    else:
        mask = (1 << bits) - 1
        lanes = [(packed >> (bits * lane)) & mask for lane in range(8 // bits)]
    return torch.stack(lanes, -1).flatten(-2)


def words(packed: torch.Tensor) -> torch.Tensor:
    """Bytes `[n, m]` as little-endian int32 words `[n, m / 4]`."""
    return packed.contiguous().flatten().view(torch.int32).view(len(packed), packed.shape[1] // 4)


def pack_high_first(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes `[n]` → bytes `[n / 2]`, the even index in the high nibble (bitsandbytes); n is even."""
    return codes[0::2] << 4 | codes[1::2]


def unpack_high_first(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_high_first`."""
    return torch.stack([packed >> 4, packed & 0xF], -1).flatten()


def _check(bits: int, fits: bool, what: str) -> None:
    if bits not in BITS:
        raise UsageError(f"there are no codes of {bits} bits", "", f"one of {', '.join(map(str, BITS))}")
    if not fits:
        raise UsageError(what, "", "a row length that is a multiple of 8")
