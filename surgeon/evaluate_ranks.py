"""Loss by rank of an adapter that was trained at every rank, as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgeon.atomic import atomic_file
from surgeon.evaluate import EvalReport, evaluate
from surgeon.evaluate_tasks import TaskReport
from surgeon.model import SurgeonModel
from surgeon.ranks import highest_rank, set_rank


def evaluate_ranks(
    model: SurgeonModel, tokenizer: Any, data: Any, ranks: Sequence[int] | None = None, **options: Any
) -> dict[int, EvalReport | TaskReport]:
    """`evaluate` at each rank (None: at every one), without training; the model is left at its highest.

    Raises:
        UsageError: no adapter has lower ranks, or a rank is not one of them.
    """
    highest = highest_rank(model.graph)
    try:
        found = {}
        for rank in ranks if ranks is not None else range(1, highest + 1):
            set_rank(model, rank)
            found[rank] = evaluate(model, tokenizer, data, **options)
        return found
    finally:
        set_rank(model, highest)


def plot_ranks(losses: Mapping[int, float], image: Path) -> None:
    """A PNG of held-out loss by rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(losses), list(losses.values()), "o-", color="#1f5fa8", linewidth=1.5, markersize=5)
    axes.set_xlabel("rank")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_xticks(list(losses))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("one adapter, every rank", loc="left")
    with atomic_file(image) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
