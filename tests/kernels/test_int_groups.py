"""Group-wise integers decoded by the kernel: the same bits as the reference."""

from __future__ import annotations

import pytest
import torch

from surgeon.kernels import int_groups
from surgeon.numerics_int import quantise_groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [8, 32, 48, 96])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_same_bits(bits: int, group: int, dtype: torch.dtype) -> None:
    stored = quantise_groups(torch.randn(37, 192), bits, group, float_zero=True)
    assert torch.equal(int_groups.launch(stored, dtype), int_groups.reference(stored, dtype))


def test_bf16_truncated_by_the_interpreter() -> None:
    stored = quantise_groups(torch.randn(5, 64), 4, 32)
    got, exact = (f(stored, torch.bfloat16) for f in (int_groups.launch, int_groups.reference))
    torch.testing.assert_close(got, exact, rtol=2**-7, atol=0)


def test_refused() -> None:
    stored = quantise_groups(torch.randn(4, 120), 4, 40)
    assert "groups of 40" in int_groups.can_use(stored, torch.float16)
    stored = quantise_groups(torch.randn(4, 64).double(), 4, 32)
    assert "scales in torch.float64" in int_groups.can_use(stored, torch.float16)


def test_operator() -> None:
    stored = quantise_groups(torch.randn(6, 48), 3, 16)
    arguments = (stored.codes, stored.scale, stored.zero, 3, torch.float16)
    assert torch.equal(int_groups.int_dequantise(*arguments), int_groups.reference(stored, torch.float16))
    torch.library.opcheck(int_groups.int_dequantise, arguments, test_utils=("test_schema", "test_faketensor"))
