"""Many adapters over one batch: against a dense product per row, with NaN in every number that no adapter owns."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from surgeon.kernels import multi_adapter as ma
from surgeon.kernels import shrink_expand
from surgeon.serve import bypass
from surgeon.serve.packed import BIAS, FIRST_A, FIRST_B, INPUT, LOW, OUT, OUTPUT, PARTS, RANK, WIDTH

INSIDE, OUTSIDE = 48, 80
CELL = 2048  # room for a row of any width that a test has, wherever its multiple begins
VECTORS = (LOW, OUT, INPUT, OUTPUT, BIAS)


@dataclass
class Pool:
    """A pool whose rows are dealt out in random order, and what each adapter should do as dense tensors."""

    data: torch.Tensor
    rows: list[int] = field(default_factory=list)
    adapters: list[list[int]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    dense: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        table = torch.tensor(self.adapters).reshape(-1, WIDTH)
        return self.data, torch.tensor(self.rows), table, torch.tensor(self.scales)

    def put(self, free: list[int], values: torch.Tensor) -> int:
        """Rows `[n, width]` somewhere among the free cells; where their numbers begin in `rows`."""
        first, width = len(self.rows), values.shape[1]
        for row in values:
            cell = free.pop()
            number = -(-cell * CELL // width)
            self.rows.append(number)
            self.data[number * width : (number + 1) * width] = row
        return first


def make_pool(
    ranks: list[int],
    *,
    vectors: str = "",
    inside: int = INSIDE,
    outside: int = OUTSIDE,
    dtype: torch.dtype = torch.float32,
) -> Pool:
    """Adapters of these ranks; `vectors` of "lousb" gives each its l, o, u, s and bias."""
    free = list(range(2 * sum(ranks) + 5 * len(ranks) + 5))
    random.shuffle(free)
    pool = Pool(torch.full((len(free) * CELL,), torch.nan, dtype=dtype))
    for rank in ranks:
        dense = {"a": torch.randn(rank, inside).to(dtype), "b": torch.randn(rank, outside).to(dtype)}
        line = [0] * WIDTH
        line[FIRST_A], line[FIRST_B], line[RANK] = pool.put(free, dense["a"]), pool.put(free, dense["b"]), rank
        for place, letter, size in zip(VECTORS, "lousb", (rank, outside, inside, outside, outside), strict=True):
            line[place] = -1
            if letter in vectors and size:
                name = "bias" if letter == "b" else letter
                dense[name] = torch.randn(size).to(dtype)
                line[place] = pool.put(free, dense[name][None])
        pool.adapters.append(line)
        pool.scales.append(random.uniform(0.5, 2.0))
        pool.dense.append(dense)
    return pool


def expected(pool: Pool, y: torch.Tensor, x: torch.Tensor, of_row: list[int], bias: torch.Tensor | None):
    """The equation, row by row, in float64."""
    result, base = y.double(), torch.zeros(1) if bias is None else bias.double()
    for row, adapter in enumerate(of_row):
        if adapter >= 0:
            dense = {name: value.double() for name, value in pool.dense[adapter].items()}
            low = x[row].double() @ dense["a"].T * dense.get("l", torch.ones(1))
            added = low @ dense["b"] * pool.scales[adapter] * dense.get("o", torch.ones(1))
            changed = (result[row] - base + added) * dense.get("s", torch.ones(1))
            result[row] = changed + dense.get("bias", base)
    return result


CASES = {
    "one row each": [0, 1, 2, 3, 4],
    "decode, unsorted, some base": [3, -1, 0, 3, 1, -1, 3, 2],
    "one long prefill": [1] * 37,
    "base only": [-1] * 5,
    "long and short": [2] * 20 + [-1] * 3 + [0] * 17 + [4],
}


@pytest.mark.parametrize("of_row", CASES.values(), ids=CASES)
@pytest.mark.parametrize("vectors", ["", "s", "lousb"])
def test_reference_is_the_equation(of_row: list[int], vectors: str) -> None:
    pool, bias = make_pool([1, 3, 7, 33, 64], vectors=vectors), torch.randn(OUTSIDE)
    x, y = torch.randn(len(of_row), INSIDE), torch.randn(len(of_row), OUTSIDE)
    for given in (None, bias):
        found = ma.reference(y, x, given, *pool.tensors(), ma.plan(of_row, pad_to=9))
        torch.testing.assert_close(found.double(), expected(pool, y, x, of_row, given), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("of_row", CASES.values(), ids=CASES)
@pytest.mark.parametrize("vectors", ["", "lousb"])
def test_the_servers_own_way_is_the_equation(of_row: list[int], vectors: str) -> None:
    """What a CPU runs under `surgeon::pooled_bypass`."""
    pool, bias = make_pool([1, 3, 7, 33, 64], vectors=vectors), torch.randn(OUTSIDE)
    x, y = torch.randn(len(of_row), INSIDE), torch.randn(len(of_row), OUTSIDE)
    wanted, given = expected(pool, y, x, of_row, bias), pool.tensors()
    found = bypass.pooled_bypass(y.clone(), x, bias, *in_lines(given), torch.tensor(of_row))
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-5)


def in_lines(given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """With one part per adapter, and rows in no bank."""
    data, rows, table, scales = given
    table = table.clone()
    table[:, PARTS] = 1
    return data, rows, table, scales


RANKS = [1, 3, 7, 33, 64, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vectors", ["", "lousb"])
@pytest.mark.parametrize("biased", [False, True])
def test_kernels_are_the_equation(dtype: torch.dtype, vectors: str, biased: bool) -> None:
    of_row = [5, 0, -1, 3, 3, 1, -1, 2, *[4] * 17]
    pool = make_pool(RANKS, vectors=vectors, inside=200, outside=136, dtype=dtype)
    bias = torch.randn(136).to(dtype) if biased else None
    x, y = torch.randn(len(of_row), 200).to(dtype), torch.randn(len(of_row), 136).to(dtype)
    segments = ma.plan(of_row, pad_to=9)
    close(shrink_expand.launch(y, x, bias, *pool.tensors(), segments, 128), expected(pool, y, x, of_row, bias))
    data, rows, table, _ = pool.tensors()
    scaled = shrink_expand.launch_scale(x, data, rows, table, segments)
    close(scaled, ma.reference_scale(x.double(), data, rows, table, segments))


def test_kernels_without_ranks() -> None:
    """Rank 0 launches no shrink; without a bias none is read."""
    pool, of_row = make_pool([0], vectors="s"), [0, 0, -1]
    x, y = torch.randn(3, INSIDE), torch.randn(3, OUTSIDE)
    found = shrink_expand.launch(y, x, None, *pool.tensors(), ma.plan(of_row), 0)
    torch.testing.assert_close(found.double(), expected(pool, y, x, of_row, None))


def test_a_row_does_not_depend_on_the_batch() -> None:
    pool = make_pool([3, 7])
    x, y = torch.randn(20, INSIDE), torch.randn(20, OUTSIDE)
    both = shrink_expand.launch(y, x, None, *pool.tensors(), ma.plan([1] * 20), 7)
    alone = shrink_expand.launch(y[4:5], x[4:5], None, *pool.tensors(), ma.plan([1]), 7)
    assert torch.equal(both[4:5], alone)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [16, 100, 640])
@pytest.mark.parametrize("outside", [16, 129, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_at_many_shapes(inside: int, outside: int, dtype: torch.dtype) -> None:
    pool = make_pool(list(range(1, 129, 9)), vectors="lousb", inside=inside, outside=outside, dtype=dtype)
    of_row = [random.randrange(-1, len(pool.adapters)) for _ in range(40)]
    x, y = torch.randn(40, inside).to(dtype), torch.randn(40, outside).to(dtype)
    found = shrink_expand.launch(y, x, None, *pool.tensors(), ma.plan(of_row, pad_to=50), 128)
    close(found, expected(pool, y, x, of_row, None))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a few roundings of the largest value: the factors of a bf16 pool are exact, sums are in fp32."""
    unit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[found.dtype]
    torch.testing.assert_close(found.double(), expected.double(), atol=unit * float(expected.abs().max()), rtol=0)


def test_rank_zero_scales_alone() -> None:
    pool, of_row = make_pool([0, 4], vectors="us"), [0, 1, 0]
    x, y = torch.randn(3, INSIDE), torch.randn(3, OUTSIDE)
    segments = ma.plan(of_row)
    data, rows, table, scales = pool.tensors()
    found = ma.reference(y, x, None, data, rows, table, scales, segments)
    torch.testing.assert_close(found[0], y[0] * pool.dense[0]["s"])
    scaled = ma.reference_scale(x, data, rows, table, segments)
    torch.testing.assert_close(scaled, torch.stack([x[i] * pool.dense[a]["u"] for i, a in enumerate(of_row)]))


def test_plan_chops_and_pads() -> None:
    segments = ma.plan([1] * 18 + [-1, 0, 1], pad_to=6)
    assert segments.tolist() == [[0, 16, 1], [16, 2, 1], [18, 1, -1], [19, 1, 0], [20, 1, 1], [21, 0, -1]]


def test_what_the_kernels_do_not_take() -> None:
    x = torch.zeros(1, 8)
    assert "dtypes" in ma.can_use(x, x, x.flatten().half())
    assert "dtypes" in ma.can_use(x.double(), x.double(), x.double().flatten())
