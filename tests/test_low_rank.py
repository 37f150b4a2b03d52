from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon import low_rank
from surgeon.low_rank import LowRank


def pair(rank: int, out: int = 9, inp: int = 7) -> LowRank:
    return LowRank(torch.randn(rank, inp), torch.randn(out, rank))


@given(st.integers(1, 12), st.integers(1, 9), st.integers(2, 12), st.integers(2, 12))
def test_truncation_is_the_svd_of_the_matrix(have: int, want: int, out: int, inp: int) -> None:
    change = pair(have, out, inp)
    made, lost = low_rank.truncated(change, want)
    u, s, vt = np.linalg.svd(change.matrix().double().numpy(), full_matrices=False)
    if have > want:
        best = (u[:, :want] * s[:want]) @ vt[:want]
        assert np.abs(made.matrix().numpy() - best).max() < 1e-4 * s[0]
        assert lost == pytest.approx(np.linalg.norm(s[want:]) / np.linalg.norm(s), abs=1e-6)
    else:
        assert made is change
        assert lost == 0


@pytest.mark.parametrize("bound", [0.5, 0.1, 1e-6])
def test_the_lowest_rank_within_an_error(bound: float) -> None:
    change = pair(6)
    made, lost = low_rank.truncated(change, error=bound)
    assert lost <= bound
    _, more = low_rank.truncated(change, made.rank - 1) if made.rank > 1 else (change, 1.0)
    assert more > bound


def test_a_sum_is_exact_and_nothing_is_a_rank_of_one() -> None:
    one, two = pair(2), pair(3)
    assert torch.allclose(low_rank.added([one, two.scaled(-0.5)]).matrix(), one.matrix() - two.matrix() / 2, atol=1e-6)
    nothing, lost = low_rank.truncated(LowRank(torch.zeros(3, 7), torch.zeros(9, 3)), error=0.1)
    assert (nothing.rank, lost) == (1, 0.0)
    matrix = torch.randn(5, 8)
    assert torch.allclose(low_rank.factored(matrix).matrix(), matrix, atol=1e-5)


def test_ties_trims_elects_and_averages_who_agrees() -> None:
    one = torch.tensor([[4.0, 1.0, -3.0, 0.1]])
    two = torch.tensor([[2.0, -5.0, 0.2, 0.3]])
    # half of each stays: [4, 0, -3, 0] and [2, -5, 0, 0]
    expected = torch.tensor([[3.0, -5.0, -3.0, 0.0]])
    assert torch.equal(low_rank.ties([one, two], [1.0, 1.0], 0.5), expected)
    against = low_rank.ties([one, two], [1.0, -1.0], 0.5)  # the first entry: +4 against -2
    assert torch.equal(against, torch.tensor([[4.0, 5.0, -3.0, 0.0]]))


def test_dare_is_the_sum_in_expectation() -> None:
    one, two = torch.randn(4, 4), torch.randn(4, 4)
    generator = torch.Generator().manual_seed(0)
    total = sum(low_rank.dare([one, two], [1.0, 0.5], 0.4, generator) for _ in range(4000)) / 4000
    assert torch.allclose(total, one + two / 2, atol=0.12)
    assert torch.equal(low_rank.dare([one], [1.0], 1.0, generator), one)
