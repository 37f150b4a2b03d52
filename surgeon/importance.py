"""Which of many triplets matter, and how many may stay: AdaLoRA's arithmetic (Zhang et al. 2023, §3.2-3.3).

Everything runs over lists of tensors or stacks of equal shape, so that it costs operators, not Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """How many triplets there may be after each step.

    Attributes:
        start: triplets at the beginning, b_0.
        target: at the end, b_T.
        warmup: steps before the first is taken away, t_i.
        settled: the step that takes the last away, T − t_f.
        interval: steps between allocations, ΔT.
    """

    start: int
    target: int
    warmup: int
    settled: int
    interval: int = 1

    def budget(self, step: int) -> int:
        """b after `step` steps: b_T + (b_0 − b_T) (1 − (t − t_i) / (T − t_f − t_i))³, as the reference code has it.

        Eq. 14 as printed takes t_f off the numerator too, which gives more than b_0 at t = t_i.
        """
        if step <= self.warmup:
            return self.start
        if step >= self.settled:
            return self.target
        left = 1 - (step - self.warmup) / (self.settled - self.warmup)
        return int((self.start - self.target) * left**3 + self.target)

    def allocates(self, step: int) -> bool:
        """Whether triplets are chosen after `step` steps; the last time is at `settled`."""
        return step == self.settled or (self.warmup < step < self.settled and step % self.interval == 0)


class Importance:
    """Of every entry w: Ī ← β1 Ī + (1 − β1) I of the sensitivity I = |w ∂L/∂w|, and Ū ← β2 Ū + (1 − β2) |I − Ī|.

    Both start at 0, without correction of that bias, as in the reference code.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Count a step; the parameters hold the gradients it was made with (none counts as 0)."""
        for name, p in parameters.items():
            if name not in self.mean:
                self.mean[name], self.spread[name] = torch.zeros_like(p), torch.zeros_like(p)
        values = list(parameters.values())
        mean, spread = ([held[name] for name in parameters] for held in (self.mean, self.spread))
        now = list(torch._foreach_mul(values, [torch.zeros_like(p) if p.grad is None else p.grad for p in values]))
        torch._foreach_abs_(now)
        torch._foreach_lerp_(mean, now, 1 - self.beta1)
        torch._foreach_sub_(now, mean)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(spread, now, 1 - self.beta2)

    def score(self, name: str) -> Tensor:
        """s = Ī · Ū of every entry of one tensor."""
        return self.mean[name] * self.spread[name]

    def triplets(self, a: str, e: str, b: str) -> Tensor:
        """S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij) `[r]`, for Q `[r, in]`, λ `[r, 1]`, P `[out, r]`."""
        return self.score(e).flatten() + self.score(b).mean(0) + self.score(a).mean(1)

    def select(self, name: str, axis: int, index: Tensor) -> None:
        """Keep some entries of a tensor along an axis."""
        for held in (self.mean, self.spread):
            if name in held:
                held[name] = held[name].index_select(axis, index)


def best(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Which entries are among the `budget` highest of all lists together, as masks; of equals the earlier stay.

    The reference code drops whatever is not above the last one dropped: of equals all, and with none to drop it fails.
    """
    order = torch.cat(list(scores)).argsort(descending=True, stable=True)
    kept = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    kept[order[:budget]] = True
    return list(kept.split([len(part) for part in scores]))


def orthogonality(rows: Sequence[Tensor], columns: Sequence[Tensor]) -> Tensor:
    """The mean of ‖Q Qᵀ − I‖ over the `rows` [r, in] and ‖Pᵀ P − I‖ over the `columns` [out, r], Frobenius.

    Not squared, as in the reference code (the paper squares it, eq. 4). Matrices of equal shape are one product.
    """
    device = (rows[0] if rows else columns[0]).device
    with torch.autocast(device.type, enabled=False):
        grams = [stack @ stack.mT for stack in _stacks(rows)] + [stack.mT @ stack for stack in _stacks(columns)]
        norms = [torch.linalg.matrix_norm(g - torch.eye(g.shape[-1], dtype=g.dtype, device=device)) for g in grams]
        return torch.cat(norms).mean() if norms else torch.zeros((), device=device)


def _stacks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of equal shape as one, `[n, ..]`; those without entries are left out."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_shape.setdefault(tensor.shape, []).append(tensor)
    return [torch.stack(group) for group in by_shape.values()]
