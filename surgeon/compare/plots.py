"""The pictures of a comparison, as SVG that stands inside a page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from surgeon.compare.rows import Row

_COLOURS = ("#1f5fa8", "#b4472e", "#3d7d45", "#7a4fa0", "#9a7412", "#2a8a94", "#a33d6e", "#555555")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")


def against(rows: Sequence[Row], of: Callable[[Row], float], label: str, base: float, *, log: bool = False) -> str:
    """Held-out loss of every method against a number of it, with the spread over seeds and the base as a line."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "surgeon", "font.family": "sans-serif"}):
        figure = Figure(figsize=(6.6, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(base, color="#888888", linewidth=1, linestyle="--", label="base")
        for number, row in enumerate(rows):
            axes.errorbar(
                [of(row)], [row.loss.mean], yerr=[row.loss.deviation], markersize=7, capsize=3, linestyle="none",
                color=_COLOURS[number % len(_COLOURS)], marker=_MARKS[number % len(_MARKS)], label=row.method,
            )  # fmt: skip
        if log:
            axes.set_xscale("log")
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
