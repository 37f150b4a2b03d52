"""Products with weights in NF4 and in integers, in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from surgeon.kernels import coded_tiles, int_matmul, nf4_matmul
from surgeon.numerics import FourBit, quantise_4bit
from surgeon.numerics_int import Groups, quantise_groups

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
RANKS = (1, 3, 7, 16, 33, 64, 128)


def check(kernel, x, weight, bias=None, low=None, up=None):  # type: ignore[no-untyped-def]
    """The kernel against its reference in float64, on the same weight rounded to the dtype of x."""
    terms = (bias, low, up)
    assert kernel.can_use(x, weight, *terms) == ""
    y = kernel.launch(x, weight, *terms)
    exact = kernel.reference(x.double(), weight, *(None if term is None else term.double() for term in terms))
    assert y.dtype == x.dtype
    assert float((y.double() - exact).abs().max() / exact.abs().max()) < TOLERANCE[x.dtype]


def coded(bits: int, rows: int, inputs: int, group: int = 32) -> FourBit | Groups:
    """A weight in NF4 (0 bits) or in integers."""
    weight = torch.randn(rows, inputs)
    return quantise_groups(weight, bits, group, float_zero=True) if bits else quantise_4bit(weight, double=True)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("bits", [0, 4])
def test_low_rank_term(bits: int, rank: int) -> None:
    kernel = int_matmul if bits else nf4_matmul
    low, up = torch.randn(5, rank), torch.randn(70, rank)
    check(kernel, torch.randn(5, 192), coded(bits, 70, 192), torch.randn(70), low, up)


@pytest.mark.parametrize("rows", [1, 16, 17, 32])
@pytest.mark.parametrize("bits", [0, 3])
def test_rows(bits: int, rows: int) -> None:
    """One token, and more than one tile of them; x may be rows of something wider."""
    wide = torch.randn(rows, 500)
    check(int_matmul if bits else nf4_matmul, wide[:, 7:135], coded(bits, 130, 128))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 2])
def test_half_precision(bits: int, dtype: torch.dtype) -> None:
    x, bias, low, up = (torch.randn(*shape).to(dtype) for shape in ((3, 128), (40,), (3, 8), (40, 8)))
    check(int_matmul if bits else nf4_matmul, x, coded(bits, 40, 128), bias, low, up)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind: str, double: bool) -> None:
    """Both books, absmax in fp32 and in codes; an odd number of blocks in a row."""
    check(nf4_matmul, torch.randn(2, 320), quantise_4bit(torch.randn(33, 320), kind, double=double))


@pytest.mark.parametrize(
    ("bits", "inputs", "group"),
    [(2, 160, 32), (3, 160, 16), (3, 176, -1), (4, 48, 16), (4, 256, 128), (8, 96, 48), (8, 200, 8), (2, 512, 256)],
)
def test_integers(bits: int, inputs: int, group: int) -> None:
    """Groups in a tile and tiles in a group, groups that are no power of two, whole rows, every width."""
    check(int_matmul, torch.randn(3, inputs), coded(bits, 33, inputs, group))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_scales_in_half_precision(stored: torch.dtype) -> None:
    weight = quantise_groups(torch.randn(20, 64), 4, 32, float_zero=True, dtype=stored)
    check(int_matmul, torch.randn(2, 64), weight)


def test_refused() -> None:
    x, weight = torch.randn(4, 128), coded(0, 8, 128)
    refused = nf4_matmul.can_use
    assert "33 rows" in refused(torch.randn(coded_tiles.MOST_ROWS + 1, 128), weight)
    assert "half of a low-rank term" in refused(x, weight, None, torch.randn(4, 2))
    assert "not contiguous in torch.float32" in refused(x, weight, torch.randn(8).double())
    assert "100 columns" in refused(torch.randn(4, 100), coded(0, 8, 100))
    assert "rows of x" in refused(torch.randn(128, 4).t(), weight)
    assert "groups of 40" in int_matmul.can_use(torch.randn(4, 120), coded(4, 8, 120, 40))


@pytest.mark.parametrize("bits", [0, 3])
def test_operators(bits: int) -> None:
    """One node each, with the reference on a CPU."""
    x, bias, low, up = torch.randn(4, 64), torch.randn(24), torch.randn(4, 3), torch.randn(24, 3)
    weight = coded(bits, 24, 64)
    if isinstance(weight, Groups):
        op, parts = int_matmul.int_matmul, (weight.codes, weight.scale, weight.zero, bits)
        exact = int_matmul.reference(x, weight, bias, low, up)
    else:
        assert weight.nested is not None
        nested = (weight.nested.scale, weight.nested.offset)
        op, parts = nf4_matmul.nf4_matmul, (weight.codes, weight.absmax, *nested, 24, 64, "nf4")
        exact = nf4_matmul.reference(x, weight, bias, low, up)
    arguments = (x, bias, low, up, *parts)
    assert torch.equal(op(*arguments), exact)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
