"""What is made once for tensors is made anew for others, and forgotten with them."""

from __future__ import annotations

import torch

from surgeon.remembered import Remembered


def test_the_same_tensors_give_the_same_result() -> None:
    calls = []
    known = Remembered(lambda a, b, *, times: calls.append(times) or (a + b) * times)
    a, b = torch.ones(2), torch.ones(2)
    assert known(a, b, times=3) is known(a, b, times=3)
    assert known(b, a, times=2).tolist() == [4, 4]
    assert calls == [3, 2]


def test_nothing_outlives_its_tensors() -> None:
    known = Remembered(lambda x: int(x.sum()))
    for number in range(50):
        x = torch.full((1,), float(number))
        assert known(x) == number  # also where a new tensor has the place of an old one
    del x
    assert not known._known
