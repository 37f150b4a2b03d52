"""Group-wise integers: equations written out, bounds as properties, the exact move of a zero point."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.errors import UsageError
from surgeon.numerics_int import Groups, dequantise_groups, quantise_groups
from surgeon.packing import BITS, unpack

MODES = ({"symmetric": True}, {}, {"float_zero": True})


def test_the_codes_are_those_of_the_equations() -> None:
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0, 5.0, 6.0, 7.0, 8.0]])
    stored = quantise_groups(weight, 2, 4, float_zero=True)
    assert unpack(stored.codes, 2).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert stored.scale.tolist() == [[1.0, 1.0]]
    assert stored.zero.tolist() == [[1.0, -5.0]]
    whole = quantise_groups(weight, 2, 4)
    assert whole.zero.tolist() == [[1.0, 0.0]]
    assert unpack(whole.codes, 2).tolist()[0][4:] == [2, 2, 3, 3]
    symmetric = quantise_groups(weight, 4, 4, symmetric=True)
    assert symmetric.scale[0, 1].item() == pytest.approx(8 / 7)
    assert symmetric.zero.tolist() == [[8.0, 8.0]]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(BITS), st.sampled_from(MODES), st.sampled_from([8, 16, -1]), st.floats(1e-4, 1e4),
       st.floats(-3, 3), st.integers(0, 2**31))  # fmt: skip
def test_any_weight_comes_back_within_half_a_step(
    bits: int, mode: dict[str, bool], group: int, size: float, shift: float, seed: int
) -> None:
    weight = (torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)) + shift) * size
    stored = quantise_groups(weight.double(), bits, group, **mode)
    assert stored.shape == (3, 32)
    assert stored.group == (32 if group == -1 else group)
    step = stored.scale.repeat_interleave(stored.group, 1)
    error = (dequantise_groups(stored, torch.float64) - weight).abs()
    bound = step * (0.5 if mode else 1.0)  # a zero point that is rounded moves the range by up to half a step
    assert (error <= bound * (1 + 1e-9) + 1e-12).all()
    back = dequantise_groups(stored, torch.float64)
    again = dataclasses.replace(stored, codes=quantise_groups(back, bits, group, **mode).codes)
    if "float_zero" in mode:
        assert torch.allclose(dequantise_groups(again, torch.float64), back, atol=1e-9 * size)


@pytest.mark.parametrize("mode", MODES)
def test_the_error_on_gaussian_weights_is_the_known_one(mode: dict[str, bool]) -> None:
    weight = torch.randn(2048, 512)
    expected = {2: (0.7174, 0.4567, 0.4497), 3: (0.2511, 0.1949, 0.1921), 4: (0.1077, 0.0910, 0.0896)}
    for bits, errors in expected.items():
        error = (dequantise_groups(quantise_groups(weight, bits, 64, **mode)) - weight).norm() / weight.norm()
        assert abs(error.item() - errors[MODES.index(mode)]) < 1.5e-3


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_constant_over_a_group_moves_into_the_zero_points(bits: int) -> None:
    """zero' = zero − d / scale: the merge of QA-LoRA, exact to the last digits of fp64."""
    weight, change = torch.randn(24, 64, dtype=torch.float64), torch.randn(24, 4, dtype=torch.float64)
    stored = quantise_groups(weight, bits, 16, float_zero=True)
    moved = Groups(stored.codes, stored.scale, stored.zero - change / stored.scale, bits)
    wanted = dequantise_groups(stored, torch.float64) + change.repeat_interleave(16, 1)
    got = dequantise_groups(moved, torch.float64)
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-14


def test_the_codes_are_the_nearest_for_the_scales_as_they_are_stored() -> None:
    weight = torch.randn(8, 64)
    stored = quantise_groups(weight, 4, 64, dtype=torch.float16, float_zero=True)
    assert stored.scale.dtype == stored.zero.dtype == torch.float16
    grid = stored.scale.float() * (torch.arange(16) - stored.zero.float())
    best = (grid[:, :, None] - weight[:, None]).abs().amin(1)
    assert torch.allclose((dequantise_groups(stored) - weight).abs(), best, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equal_values_come_back(mode: dict[str, bool], dtype: torch.dtype) -> None:
    for value in (0.0, 1.5, -2.0):
        stored = quantise_groups(torch.full((2, 16), value), 4, 16, dtype=dtype, **mode)
        assert dequantise_groups(stored) == pytest.approx(torch.full((2, 16), value), rel=1e-3)


def test_a_zero_point_that_fp16_cannot_hold() -> None:
    weight = torch.full((1, 8), 100.0)
    weight[0, 0] += 1e-4
    stored = quantise_groups(weight, 4, 8, dtype=torch.float16, float_zero=True)
    assert torch.isfinite(stored.zero).all()
    assert dequantise_groups(stored) == pytest.approx(weight, rel=1e-3)


@pytest.mark.parametrize(
    ("shape", "bits", "group", "what", "hint"),
    [
        ((2, 48), 4, 32, "48 inputs are no whole number of groups of 32", "--group 16"),
        ((2, 36), 4, 32, "groups of 32", "--group -1"),
        ((2, 36), 3, -1, "do not fill whole bytes", "--exclude"),
        ((2, 32), 5, 32, "no codes of 5 bits", "2, 3, 4, 8"),
        ((2, 32), 4, 0, "groups of 0", "--group 32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(shape: tuple[int, int], bits: int, group: int, what: str, hint: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        quantise_groups(torch.randn(shape), bits, group)
    assert hint in caught.value.hint


def test_values_that_are_not_finite_are_refused() -> None:
    weight = torch.randn(2, 32)
    weight[1, 4] = float("nan")
    with pytest.raises(UsageError, match="not finite"):
        quantise_groups(weight)
