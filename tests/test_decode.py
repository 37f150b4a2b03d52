"""Fast decoding against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from surgeon import decode
from surgeon.decode import decode_4bit, decode_groups
from surgeon.numerics import dequantise_4bit, quantise_4bit
from surgeon.numerics_int import dequantise_groups, quantise_groups

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True, params=[1 << 19, 1024], ids=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_CHUNK", request.param)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_4_bit_codes(kind: str, double: bool) -> None:
    for shape in ((1, 1), (7, 9), (5, 130), (64, 64), (31, 101)):
        stored = quantise_4bit(torch.randn(shape), kind, double=double)
        assert all(torch.equal(decode_4bit(stored, dtype), dequantise_4bit(stored, dtype)) for dtype in DTYPES)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_groups(bits: int, wide: torch.dtype) -> None:
    stored = quantise_groups(torch.randn(21, 256, dtype=wide), bits, 8, float_zero=True)
    assert all(torch.equal(decode_groups(stored, dtype), dequantise_groups(stored, dtype)) for dtype in DTYPES)
