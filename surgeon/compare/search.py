"""The search for a learning rate: short runs find it, a whole one confirms it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgeon.errors import SurgeonError

MOST_RATES = 5
"""That short runs try: they go on beyond the first three while the best is the last."""
MOST_CONFIRMED = 3
"""That whole runs try."""


@dataclass(frozen=True)
class Found:
    """A learning rate and what it was chosen by.

    Attributes:
        lr: the learning rate.
        tried: the loss after a short run by learning rate; None where it was not a number.
        whole: the same after a whole run.
    """

    lr: float
    tried: dict[str, float | None]
    whole: dict[str, float | None]


def search(rates: Sequence[float], short: Callable[[float], float], whole: Callable[[float], float]) -> Found:
    """The learning rate with the least loss after a whole run, from the best of short runs downwards.

    A rate that is best after a quarter of the steps need not be after all ("short-horizon bias", Wu et al. 2018,
    arXiv 1803.02021), and one at the edge of what is stable learns in one run and nothing in the next. The next lower
    rate has a whole run too, therefore, and the one below it where that was better.

    Args:
        rates: the first to be tried, lowest first.
        short: the loss after a short run; infinite if it is not a number.
        whole: the loss after a run of all steps.

    Raises:
        SurgeonError: the lowest rate fails.
    """
    tried = {rates[0]: short(rates[0])}  # where the lowest fails, a lower one does not help: it raises
    waiting = list(rates[1:])
    while waiting:
        lr = waiting.pop(0)
        tried[lr] = _or_infinite(short, lr)
        if not waiting and (beyond := outside(tried)):
            waiting.append(beyond)
    best = min(tried, key=tried.__getitem__)
    confirmed: dict[float, float] = {}
    for lr in sorted((lr for lr in tried if lr <= best), reverse=True)[:MOST_CONFIRMED]:
        confirmed[lr] = _or_infinite(whole, lr)
        if math.isfinite(confirmed[lr]) and confirmed[lr] > min(confirmed.values()):
            break
    return Found(min(confirmed, key=confirmed.__getitem__), _told(tried), _told(confirmed))


def _or_infinite(run: Callable[[float], float], lr: float) -> float:
    try:
        return run(lr)
    except SurgeonError:
        return math.inf


def outside(tried: dict[float, float]) -> float | None:
    """The next learning rate to try: three times beyond the best, while that is the last on its side."""
    best = min(tried, key=tried.__getitem__)
    if len(tried) >= MOST_RATES or min(tried) < best < max(tried):
        return None
    return best * 3 if best == max(tried) else best / 3


def _told(losses: dict[float, float]) -> dict[str, float | None]:
    return {f"{lr:.3g}": loss if math.isfinite(loss) else None for lr, loss in losses.items()}
