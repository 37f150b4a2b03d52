"""GPTQ against its formula in NumPy, and against the nearest codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from surgeon.errors import UsageError
from surgeon.gptq import Hessian, quantise_gptq
from surgeon.numerics_int import dequantise_groups, quantise_groups
from surgeon.packing import unpack

BITS = (2, 3, 4, 8)


def problem(out: int = 12, inp: int = 48, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs that are alike, as those of a transformer are."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(inp, inp, generator=generator) * torch.logspace(0, -1.5, inp)
    return torch.randn(out, inp, generator=generator), torch.randn(tokens, inp, generator=generator) @ mixed


def formula(weight: np.ndarray, x: np.ndarray, bits: int, group: int, damping: float) -> np.ndarray:
    """Column by column with the inverse of what is left of H: no Cholesky factor, no blocks."""
    hessian = x.T @ x / len(x)
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    left, codes, top = weight.copy(), np.zeros(weight.shape, int), 2**bits - 1
    for column in range(weight.shape[1]):
        if column % group == 0:
            low, high = (getattr(left[:, column : column + group], end)(1) for end in ("min", "max"))
            scale = (high - low) / top
            zero = -low / scale
        codes[:, column] = np.clip(np.round(left[:, column] / scale + zero), 0, top)
        inverse = np.linalg.inv(hessian[column:, column:])
        wrong = (left[:, column] - scale * (codes[:, column] - zero)) / inverse[0, 0]
        left[:, column + 1 :] -= np.outer(wrong, inverse[0, 1:])
    return codes


def factor_of(x: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    gathered = Hessian(x.shape[1])
    for part in x.split(150):
        gathered.add(part)
    return gathered.factor(damping)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [8, 48])
def test_the_codes_are_the_formulas(bits: int, group: int) -> None:
    weight, x = problem()
    stored = quantise_gptq(weight, factor_of(x, 0.05), bits, group, float_zero=True)
    expected = formula(weight.double().numpy(), x.double().numpy(), bits, group, 0.05)
    found = unpack(stored.codes, bits).numpy()
    assert (found != expected).mean() < (0.03 if bits == 8 else 1e-9)  # fp32 rounds some of 256 codes otherwise


@pytest.mark.parametrize("group", [96, 160, 200, -1])
def test_groups_that_are_no_part_of_a_block(group: int) -> None:
    inputs = {96: 288, 160: 480, 200: 400, -1: 200}[group]
    weight, x = problem(6, inputs, 900)
    stored = quantise_gptq(weight, factor_of(x), 4, group, float_zero=True)
    size = inputs if group == -1 else group
    expected = formula(weight.double().numpy(), x.double().numpy(), 4, size, 0.01)
    assert (unpack(stored.codes, 4).numpy() != expected).mean() < 1e-2
    assert stored.group == size


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", [{"float_zero": True}, {}, {"symmetric": True}])
def test_the_outputs_are_nearer_than_those_of_the_nearest_codes(bits: int, mode: dict[str, bool]) -> None:
    weight, x = problem(32, 64)
    ours = quantise_gptq(weight, factor_of(x), bits, 16, dtype=torch.float16, **mode)
    nearest = quantise_groups(weight, bits, 16, dtype=torch.float16, **mode)
    error, other = ((x @ (dequantise_groups(one) - weight).T).norm() for one in (ours, nearest))
    assert error < 0.8 * other
    assert ours.scale.dtype == torch.float16
    if mode:
        return
    assert torch.equal(ours.zero, ours.zero.round())
    assert bool(((ours.zero >= 0) & (ours.zero < 2**bits)).all())


def test_inputs_that_are_never_seen_are_rounded_to_the_nearest() -> None:
    weight, x = problem()
    x[:, 8:16] = 0
    stored = quantise_gptq(weight, factor_of(x), 4, 8, float_zero=True)
    nearest = quantise_groups(weight[:, 8:16].contiguous(), 4, 8, float_zero=True)
    assert torch.equal(unpack(stored.codes, 4)[:, 8:16], unpack(nearest.codes, 4))


def test_inputs_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        Hessian(4).factor()
    with pytest.raises(UsageError, match="not finite"):
        factor_of(torch.full((3, 4), float("nan")))
    alike = torch.ones(5, 4)
    with pytest.raises(UsageError, match="too much alike") as caught:
        factor_of(alike, 0.0)
    assert "damping" in caught.value.hint
    weight, x = problem()
    weight[3, 5] = float("inf")
    with pytest.raises(UsageError, match="not finite"):
        quantise_gptq(weight, factor_of(x), 4, 8)
