from __future__ import annotations

import numpy as np
import torch
from torch import nn

from surgeon.importance import Importance, Schedule, best, orthogonality


def test_the_budget_is_that_of_the_reference_code() -> None:
    schedule = Schedule(start=864, target=576, warmup=500, settled=1500)
    found = {step: schedule.budget(step) for step in (500, 501, 600, 750, 1000, 1250, 1500, 3000)}
    assert found == {500: 864, 501: 863, 600: 785, 750: 697, 1000: 612, 1250: 580, 1500: 576, 3000: 576}
    assert [t for t in range(25) if Schedule(9, 3, 4, 20, 6).allocates(t)] == [6, 12, 18, 20]


def test_importance_is_its_formula_in_numpy() -> None:
    rng = np.random.default_rng(0)
    p = {
        "a": nn.Parameter(torch.randn(3, 5)),
        "e": nn.Parameter(torch.randn(3, 1)),
        "b": nn.Parameter(torch.randn(4, 3)),
    }
    importance = Importance(0.85, 0.7)
    mean, spread = ({name: np.zeros(tuple(t.shape)) for name, t in p.items()} for _ in range(2))
    for _ in range(6):
        for name, t in p.items():
            t.grad = torch.from_numpy(rng.normal(size=tuple(t.shape))).float()
            now = np.abs(t.detach().numpy() * t.grad.numpy())
            mean[name] = 0.85 * mean[name] + 0.15 * now
            spread[name] = 0.7 * spread[name] + 0.3 * np.abs(now - mean[name])
        importance.update(p)
    s = {name: mean[name] * spread[name] for name in p}
    expected = s["e"][:, 0] + s["a"].mean(1) + s["b"].mean(0)
    assert np.allclose(importance.triplets("a", "e", "b").numpy(), expected, rtol=1e-4)


def test_of_equals_the_earlier_stay_and_nothing_to_drop_is_no_error() -> None:
    scores = [torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 0.0])]
    assert [mask.tolist() for mask in best(scores, 2)] == [[False, True, True], [False, False]]
    assert all(mask.all() for mask in best(scores, 5))
    assert not any(mask.any() for mask in best(scores, 0))


def test_the_regulariser_is_the_mean_norm_of_every_matrix() -> None:
    rows = [torch.randn(3, 7), torch.randn(3, 7), torch.randn(2, 7), torch.empty(0, 7)]
    columns = [torch.randn(5, 3), torch.randn(5, 2)]
    norms = [torch.norm(m @ m.T - torch.eye(len(m))) for m in (*rows[:3], *(c.T for c in columns))]
    assert torch.allclose(orthogonality(rows, columns), torch.stack(norms).mean())
