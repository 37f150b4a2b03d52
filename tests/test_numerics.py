"""NF4 and FP4 against the paper's constants, against bitsandbytes bit for bit, and as properties of any tensor."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import UsageError
from surgeon.numerics import (
    KINDS,
    NF4,
    code_book,
    dequantise_4bit,
    dequantise_absmax,
    dynamic_map,
    nearest_codes,
    quantise_4bit,
    quantise_absmax,
    thresholds,
)  # fmt: skip
from surgeon.packing import unpack_high_first

SHAPES = [(1, 1), (1, 2), (7, 9), (3, 65), (5, 130), (64, 64), (300, 257), (257, 300)]
THRESHOLDS = (
    -0.84809640, -0.61063293, -0.45999527, -0.33967943, -0.23460741, -0.13791173, -0.04552502, 0.03979015,
    0.12025525, 0.20352125, 0.29201377, 0.38931254, 0.50166342, 0.64278692, 0.86147842,
)  # fmt: skip


def test_nf4_is_made_of_quantiles_of_the_normal_distribution() -> None:
    """C-59: o = ½ [(1 − 1/30) + (1 − 1/32)], 8 positive quantiles, 7 negative ones, zero, over their maximum."""
    normal = torch.distributions.Normal(0.0, 1.0)
    o = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    assert round(o, 7) == 0.9677083
    positive = normal.icdf(torch.linspace(o, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(o, 0.5, 8, dtype=torch.float64)[:-1])
    made = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    assert (made / made.max() - torch.tensor(NF4)).abs().max() < 2e-7


def test_the_thresholds_are_the_midpoints() -> None:
    midpoints, order = thresholds("nf4")
    assert (midpoints - torch.tensor(THRESHOLDS)).abs().max() < 1e-7
    assert order.tolist() == list(range(16))


@pytest.mark.parametrize("kind", KINDS)
def test_the_codes_are_those_of_a_search(kind: str) -> None:
    midpoints, order = thresholds(kind)
    near = midpoints[:, None].double() * (1 + torch.arange(-4, 5) * 3e-8)
    edges = torch.arange(-1024, 1025)[:, None] / 1024 + torch.arange(-4, 5) * 3e-8
    values = torch.cat([near.flatten(), edges.flatten(), torch.rand(20000) * 2 - 1]).float().clamp(-1, 1)
    assert torch.equal(nearest_codes(values, kind), order[torch.bucketize(values, midpoints)])


@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_are_those_of_bitsandbytes(kind: str) -> None:
    assert torch.equal(code_book(kind), bitsandbytes.get_4bit_type(kind, "cpu"))
    assert torch.equal(dynamic_map(), bitsandbytes.create_dynamic_map())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_absmax_are_those_of_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        weight = (torch.randn(shape) * 0.02).to(dtype)
        codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
        plain = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=kind)[1]
        ours = quantise_4bit(weight, kind, double=True)
        assert ours.nested is not None
        assert torch.equal(ours.codes, codes[:, 0])
        assert torch.equal(quantise_4bit(weight, kind).absmax, plain.absmax)
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.nested.scale, state.state2.absmax)
        assert torch.equal(ours.nested.offset, state.offset)


def test_large_tensors_are_quantised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(shape) for shape in SHAPES]
    whole = [quantise_4bit(weight) for weight in weights]
    monkeypatch.setattr("surgeon.numerics._CHUNK", 128)
    for weight, expected in zip(weights, whole, strict=True):
        found = quantise_4bit(weight)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.absmax, expected.absmax)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_weights_are_those_of_bitsandbytes(kind: str) -> None:
    for shape in [(5, 130), (64, 64), (257, 300)]:
        weight = torch.randn(shape)
        codes, state = bitsandbytes.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            state.dtype = dtype
            theirs = bitsandbytes.dequantize_4bit(codes, state)
            assert torch.equal(dequantise_4bit(quantise_4bit(weight, kind, double=True), dtype), theirs)


def test_codes_of_values_on_the_grid_and_between_its_points() -> None:
    """The absmax of a trained weight lie close together: the codes must agree for any values, not for spread ones."""
    points = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65535 * 2 - 1
    absmax = torch.nn.functional.pad(points.float().reshape(256, 256), (1, 0), value=1.0)[:, :256].reshape(-1) * 0.37
    codes, state = bitsandbytes.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    ours, nested = quantise_absmax(absmax)
    assert torch.equal(ours, codes)
    assert torch.equal(nested.scale, state.absmax)
    assert torch.equal(dequantise_absmax(ours, nested), bitsandbytes.dequantize_blockwise(codes, state) + nested.offset)


def test_the_error_on_gaussian_weights_is_the_known_one() -> None:
    weight = torch.randn(2048, 512)
    for double in (False, True):
        error = dequantise_4bit(quantise_4bit(weight, double=double)) - weight
        assert abs((error.norm() / weight.norm()).item() - 0.0918) < 1e-3


def test_the_bits_per_weight_are_the_papers() -> None:
    """C-52, C-53: 32/64, and 8/64 + 32/(64 · 256) with double quantisation."""
    weight = torch.zeros(256, 64)
    assert quantise_4bit(weight).bits == 4 + 0.5
    assert quantise_4bit(weight, double=True).bits == 4 + 0.126953125


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 140), st.floats(1e-6, 1e6), st.sampled_from(KINDS), st.integers(0, 2**31))
def test_any_tensor_comes_back_within_its_bounds(rows: int, columns: int, size: float, kind: str, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
    stored = quantise_4bit(weight, kind)
    back = dequantise_4bit(stored)
    assert back.shape == weight.shape
    assert stored.codes.numel() == (weight.numel() + 1) // 2
    widest = {"nf4": 0.152, "fp4": 1 / 6}[kind]  # half of the widest step of the book
    bound = stored.absmax.repeat_interleave(64)[: weight.numel()].view(weight.shape)
    assert ((back - weight).abs() <= bound * (widest + 1e-5)).all()
    again = quantise_4bit(back, kind)
    assert torch.equal(dequantise_4bit(again), back)  # what is on the grid stays


def test_zeros_stay_zeros() -> None:
    stored = quantise_4bit(torch.zeros(3, 70), double=True)
    assert (unpack_high_first(stored.codes)[:210] == 7).all()
    assert not dequantise_4bit(stored).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.zeros(4, 64)
    weight[2, 3] = value
    with pytest.raises(UsageError, match="1 block"):
        quantise_4bit(weight)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(UsageError, match="no 4-bit type 'nf3'"):
        code_book("nf3")
