"""Packed codes: the inverse, the bits, and the layouts other formats read from the same bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import UsageError
from surgeon.packing import BITS, pack, pack_high_first, unpack, unpack_high_first


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(BITS), st.integers(0, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_unpacking_is_the_inverse(bits: int, rows: int, eights: int, random) -> None:
    codes = torch.tensor([[random.randrange(2**bits) for _ in range(8 * eights)] for _ in range(rows)]).to(torch.uint8)
    codes = codes.reshape(rows, 8 * eights)
    packed = pack(codes, bits)
    assert packed.shape == (rows, eights * bits)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_bytes_are_a_little_endian_stream(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (32,), dtype=torch.uint8)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    assert bytes(pack(codes, bits).tolist()) == stream.to_bytes(4 * bits, "little")


def test_three_bit_words_are_gptqs() -> None:
    """32 codes in three words: ten whole ones, one of two bits and one, ten, one of one bit and two, ten."""
    codes = torch.randint(0, 8, (32,), dtype=torch.uint8)
    c = codes.tolist()
    first = sum(c[i] << (3 * i) for i in range(10)) | (c[10] & 3) << 30
    second = c[10] >> 2 | sum(c[11 + i] << (3 * i + 1) for i in range(10)) | (c[21] & 1) << 31
    third = c[21] >> 1 | sum(c[22 + i] << (3 * i + 2) for i in range(10))
    words = [word & 0xFFFFFFFF for word in pack(codes, 3).view(torch.int32).tolist()]
    assert words == [first, second, third]


def test_high_first_is_the_other_nibble_order() -> None:
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert pack_high_first(codes).tolist() == [0x12, 0x34]
    assert pack(codes, 4).tolist() == [0x21, 0x43]
    assert torch.equal(unpack_high_first(pack_high_first(codes)), codes)


@pytest.mark.parametrize(("bits", "count", "what"), [(5, 8, "no codes of 5 bits"), (3, 4, "4 codes of 3 bits")])
def test_what_does_not_fit_is_refused(bits: int, count: int, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        pack(torch.zeros(count, dtype=torch.uint8), bits)
