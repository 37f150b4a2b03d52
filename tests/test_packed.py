"""Packed products against decoded weights: how near, when they are used, and when they are not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import surgeon
from benchmarks.zoo.folders import folder_of
from surgeon import packed
from surgeon.decode import decode_4bit, decode_groups
from surgeon.numerics import FourBit, quantise_4bit
from surgeon.numerics_int import Groups, quantise_groups
from surgeon.packed import packed_products, product

OUT, INP = 96, 128


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(OUT, INP, generator=torch.Generator().manual_seed(0)) * 0.02


def of(rows: int) -> torch.Tensor:
    return torch.randn(2, rows, INP, generator=torch.Generator().manual_seed(1)).bfloat16()


def error(found: torch.Tensor, x: torch.Tensor, exact: torch.Tensor) -> float:
    expected = x.double() @ exact.double().t()
    return float((found.double() - expected).norm() / expected.norm())


def require_near(stored: FourBit | Groups, exact: torch.Tensor) -> None:
    """As near as the product with a decoded bf16 weight, for one token and for several."""
    for rows in (1, 7):
        x = of(rows)
        with torch.no_grad(), packed_products():
            found = product(x, stored)
        assert found is not None
        assert found.shape == (2, rows, OUT)
        assert error(found, x, exact) <= 1.5 * error(F.linear(x, exact.bfloat16()), x, exact) + 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("float_zero", [True, False])
def test_integers(weight: torch.Tensor, bits: int, group: int, float_zero: bool) -> None:
    stored = quantise_groups(weight, bits, group, float_zero=float_zero)
    require_near(stored, decode_groups(stored))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_four_bits(weight: torch.Tensor, kind: str, double: bool) -> None:
    stored = quantise_4bit(weight, kind, double=double)
    if packed._has_bitsandbytes():
        require_near(stored, decode_4bit(stored))
    else:
        with torch.no_grad(), packed_products():
            assert product(of(1), stored) is None


def test_only_where_they_are_allowed_and_faster(weight: torch.Tensor) -> None:
    stored = quantise_groups(weight, 4, 32)
    with packed_products():
        assert product(of(1), stored) is None  # gradients may be wanted
    with torch.no_grad():
        assert product(of(1), stored) is None
        with packed_products():
            assert product(of(1), stored) is not None
            assert product(of(1).float(), stored) is None
            assert product(of(packed.TOKENS[Groups]), stored) is None  # twice as many rows
            assert product(of(1), quantise_groups(weight, 8, 32)) is None
            assert product(of(1), quantise_groups(weight, 4, 16)) is None
            with packed_products(False):
                assert product(of(1), stored) is None


def test_codes_that_change_are_packed_again(weight: torch.Tensor) -> None:
    stored = quantise_groups(weight, 4, 32)
    x = of(1)
    with torch.no_grad(), packed_products():
        before = product(x, stored)
        stored.scale.mul_(2)
        after = product(x, stored)
    assert before is not None
    assert after is not None
    torch.testing.assert_close(after, 2 * before)


def test_a_kernel_that_computes_something_else_is_not_used(
    weight: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_by_torch", lambda x, **_: x.new_zeros(x.shape[0], OUT))
    with torch.no_grad(), packed_products():
        assert product(of(1), quantise_groups(weight, 4, 32)) is None


def test_generating_and_evaluating_use_them_and_a_plain_forward_pass_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(packed, "_packed", lambda stored: used.append(1))
    model = surgeon.apply(folder_of("llama"), "intq", group=16, dtype=torch.bfloat16)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        model(input_ids=ids)
    assert not used
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert used
