"""Many adapters over one batch: against a dense product per row, with NaN in every page that no adapter owns."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from surgeon.kernels import multi_adapter as ma
from surgeon.kernels import shrink_expand

INSIDE, OUTSIDE = 48, 80


@dataclass
class Pool:
    """A pool whose pages are dealt out in random order, and what each adapter should do as dense tensors."""

    a_rows: torch.Tensor
    b_rows: torch.Tensor
    rows: list[int] = field(default_factory=list)
    adapters: list[list[int]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    dense: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        table = torch.tensor(self.adapters, dtype=torch.int32).reshape(-1, 5)
        return self.a_rows, self.b_rows, torch.tensor(self.rows, dtype=torch.int32), table, torch.tensor(self.scales)


def make_pool(
    ranks: list[int],
    *,
    vectors: str = "",
    inside: int = INSIDE,
    outside: int = OUTSIDE,
    dtype: torch.dtype = torch.float32,
) -> Pool:
    """Adapters of these ranks; `vectors` of "uos" gives each of them an input scale, an output scale, a bias."""
    free = list(range(sum(ranks) + 3 * len(ranks) + 5))
    random.shuffle(free)
    empty = [torch.full((len(free), size), torch.nan, dtype=dtype) for size in (inside, outside)]
    pool = Pool(*empty)
    for rank in ranks:
        pages = [free.pop() for _ in range(rank)]
        dense = {"a": torch.randn(rank, inside).to(dtype), "b": torch.randn(rank, outside).to(dtype)}
        pool.a_rows[pages], pool.b_rows[pages] = dense["a"], dense["b"]
        entry = [len(pool.rows), rank, -1, -1, -1]
        for place, letter, rows, size in (
            (ma.INPUT, "u", pool.a_rows, inside), (ma.OUTPUT, "s", pool.b_rows, outside),
            (ma.BIAS, "b", pool.b_rows, outside),
        ):  # fmt: skip
            if letter in vectors:
                entry[place] = free.pop()
                dense["bias" if letter == "b" else letter] = rows[entry[place]] = torch.randn(size).to(dtype)
        pool.rows += pages
        pool.adapters.append(entry)
        pool.scales.append(random.uniform(0.5, 2.0))
        pool.dense.append(dense)
    return pool


def expected(pool: Pool, y: torch.Tensor, x: torch.Tensor, of_row: list[int], bias: torch.Tensor | None):
    """The equation, row by row, in float64."""
    result = y.double()
    for row, adapter in enumerate(of_row):
        last = bias
        if adapter >= 0:
            dense, scale = pool.dense[adapter], pool.scales[adapter]
            low = (x[row].double() @ dense["a"].double().T) @ dense["b"].double() * scale
            result[row] = (result[row] + low) * dense.get("s", torch.ones(1))
            last = dense.get("bias", bias)
        if last is not None:
            result[row] += last
    return result


CASES = {
    "one row each": [0, 1, 2, 3, 4],
    "decode, unsorted, some base": [3, -1, 0, 3, 1, -1, 3, 2],
    "one long prefill": [1] * 37,
    "base only": [-1] * 5,
    "long and short": [2] * 20 + [-1] * 3 + [0] * 17 + [4],
}


@pytest.mark.parametrize("of_row", CASES.values(), ids=CASES)
@pytest.mark.parametrize("vectors", ["", "s", "usb"])
def test_reference_is_the_equation(of_row: list[int], vectors: str) -> None:
    pool, bias = make_pool([1, 3, 7, 33, 64], vectors=vectors), torch.randn(OUTSIDE)
    x, y = torch.randn(len(of_row), INSIDE), torch.randn(len(of_row), OUTSIDE)
    order, segments = ma.plan(of_row, pad_to=9)
    for given in (None, bias):
        found = ma.multi_adapter(y, x, *pool.tensors(), order, segments, given, 64)
        torch.testing.assert_close(found.double(), expected(pool, y, x, of_row, given), atol=1e-4, rtol=1e-5)


RANKS = [1, 3, 7, 33, 64, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vectors", ["", "usb"])
def test_kernels_are_the_equation(dtype: torch.dtype, vectors: str) -> None:
    of_row = [5, 0, -1, 3, 3, 1, -1, 2, *[4] * 17]
    pool, bias = make_pool(RANKS, vectors=vectors, inside=200, outside=136, dtype=dtype), torch.randn(136).to(dtype)
    x, y = torch.randn(len(of_row), 200).to(dtype), torch.randn(len(of_row), 136).to(dtype)
    order, segments = ma.plan(of_row, pad_to=9)
    found = shrink_expand.launch(y, x, *pool.tensors(), order, segments, bias, 128)
    close(found, expected(pool, y, x, of_row, bias))
    scaled = shrink_expand.launch_scale(x, pool.a_rows, pool.tensors()[3], order, segments)
    close(scaled, ma.reference_scale(x.double(), pool.a_rows, pool.tensors()[3], order, segments))


def test_kernels_on_rows_as_they_stand_without_ranks() -> None:
    """Rank 0 launches no shrink; without an order and a bias neither is read."""
    pool, of_row = make_pool([0], vectors="s"), [0, 0, -1]
    x, y = torch.randn(3, INSIDE), torch.randn(3, OUTSIDE)
    segments = torch.tensor([[0, 2, 0], [2, 1, -1]], dtype=torch.int32)
    found = shrink_expand.launch(y, x, *pool.tensors(), None, segments, None, 0)
    torch.testing.assert_close(found.double(), expected(pool, y, x, of_row, None))


def test_a_row_does_not_depend_on_the_batch() -> None:
    pool = make_pool([3, 7])
    x, y = torch.randn(20, INSIDE), torch.randn(20, OUTSIDE)
    both = shrink_expand.launch(y, x, *pool.tensors(), *ma.plan([1] * 20), None, 7)
    alone = shrink_expand.launch(y[4:5], x[4:5], *pool.tensors(), *ma.plan([1]), None, 7)
    assert torch.equal(both[4:5], alone)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [16, 100, 640])
@pytest.mark.parametrize("outside", [16, 129, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_at_many_shapes(inside: int, outside: int, dtype: torch.dtype) -> None:
    pool = make_pool(list(range(1, 129, 9)), vectors="usb", inside=inside, outside=outside, dtype=dtype)
    of_row = [random.randrange(-1, len(pool.adapters)) for _ in range(40)]
    x, y = torch.randn(40, inside).to(dtype), torch.randn(40, outside).to(dtype)
    found = shrink_expand.launch(y, x, *pool.tensors(), *ma.plan(of_row, pad_to=50), None, 128)
    close(found, expected(pool, y, x, of_row, None))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within a few roundings of the largest value: the factors of a bf16 pool are exact, sums are in fp32."""
    unit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[found.dtype]
    torch.testing.assert_close(found.double(), expected, atol=unit * float(expected.abs().max()), rtol=0)


def test_rank_zero_scales_alone() -> None:
    pool, of_row = make_pool([0, 4], vectors="us"), [0, 1, 0]
    x, y = torch.randn(3, INSIDE), torch.randn(3, OUTSIDE)
    order, segments = ma.plan(of_row)
    found = ma.multi_adapter(y, x, *pool.tensors(), order, segments)
    torch.testing.assert_close(found[0], y[0] * pool.dense[0]["s"])
    scaled = ma.scale_inputs(x, pool.a_rows, pool.tensors()[3], order, segments)
    torch.testing.assert_close(scaled, torch.stack([x[i] * pool.dense[a]["u"] for i, a in enumerate(of_row)]))


def test_plan_chops_sorts_and_pads() -> None:
    order, segments = ma.plan([1] * 18 + [-1, 0], pad_to=6)
    assert order.tolist() == [18, 19, *range(18)]
    assert segments.tolist() == [[0, 1, -1], [1, 1, 0], [2, 16, 1], [18, 2, 1], [20, 0, -1], [20, 0, -1]]


def test_rows_as_they_stand() -> None:
    pool, of_row = make_pool([3, 7]), [0, 0, 1]
    x, y = torch.randn(3, INSIDE), torch.randn(3, OUTSIDE)
    order, segments = ma.plan(of_row)
    assert torch.equal(
        ma.multi_adapter(y, x, *pool.tensors(), None, segments),
        ma.multi_adapter(y, x, *pool.tensors(), order, segments),
    )


def test_one_node_of_an_exported_graph() -> None:
    pool, (order, segments) = make_pool([3, 7]), ma.plan([0, 1, -1])

    class Module(torch.nn.Module):
        def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.surgeon.multi_adapter(y, x, *pool.tensors(), order, segments, None, 7)

    x, y = torch.randn(3, INSIDE), torch.randn(3, OUTSIDE)
    program = torch.export.export(Module(), (y, x)).run_decompositions({})
    assert "surgeon.multi_adapter" in str(program.graph)
    assert torch.equal(program.module()(y, x), Module()(y, x))
