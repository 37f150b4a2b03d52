"""The self-contained web page of a comparison: no scripts, no fonts, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from surgeon.cli import output
from surgeon.cli.page import kind
from surgeon.compare.plots import against
from surgeon.compare.rows import AFTER, Row, Spread
from surgeon.compare.settings import Settings


def render(
    settings: Settings,
    base: Mapping[str, Any],
    rows: Sequence[Row],
    failed: Mapping[str, str],
    left_out: Mapping[str, str],
) -> str:
    """The page, as HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = resources.files("surgeon.cli").joinpath("data/compare.html.j2").read_text(encoding="utf-8")
    loss = float(base["loss"])
    plots = {
        "Loss against trained parameters": against(rows, lambda row: row.trained, "trained parameters", loss, log=True),
        "Loss against the time of a step": against(rows, lambda row: row.seconds_per_step, "seconds per step", loss),
    }
    return environment.from_string(source).render(
        settings=settings,
        base=base,
        rows=rows,
        after=AFTER,
        peers=any(row.peer or row.without_peer for row in rows),
        missing={**left_out, **failed},
        plots={name: Markup(svg) for name, svg in plots.items()},
        diffs=[(row.method, [(kind(line), line) for line in row.diff.splitlines()[2:]]) for row in rows if row.diff],
        best=min((row.loss.mean for row in rows), default=0.0),
        size=output.size,
        spread=spread,
        cell=cell,
        settings_of=settings_of,
    )


def spread(value: Spread) -> str:
    """`2.1034 ± 0.0041`."""
    return f"{value.mean:.4f} ± {value.deviation:.4f}" if value.deviation else f"{value.mean:.4f}"


def cell(value: float | str | None) -> str:
    """A loss, or a dash where there is none."""
    return f"{value:.4f}" if isinstance(value, float) else "–"


def settings_of(row: Row) -> str:
    """Its options and learning rate in words."""
    words = [f"{name} {value}" for name, value in row.options.items()]
    return ", ".join([*words, f"lr {row.lr:.3g}"])
