"""Merging over a quantised base, one way (`surgeon.lower.ways`): told, refused or written, and read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon import context
from surgeon.coded import CodedCheckpoint
from surgeon.errors import CheckFailed, UsageError
from surgeon.graph import Graph
from surgeon.heads import head_config
from surgeon.hold import holders
from surgeon.lower.merge import Merged, merge
from surgeon.lower.quantise import Replay
from surgeon.lower.quantised import Written, write_quantised
from surgeon.lower.saved import Saved, fitted, misfit
from surgeon.lower.ways import WAYS, Again, WayError, errors, is_quantised, way_graphs
from surgeon.source import Source
from surgeon.strip import without
from surgeon.verification import Comparison, Probe, make_probes

LIMIT = 0.02
"""Relative error of the outputs above which a merge is refused unless it is accepted."""


@dataclass(frozen=True)
class Into:
    """A merge over a quantised base: how it was done, what each way would have lost, and what was written.

    Attributes:
        way: one of `WAYS`.
        errors: of every way.
        merged: floating-point weights and their proof, if those were written.
        quantised: codes, if those were.
        comparison: the written codes, read again, against what was meant.
    """

    way: str
    errors: tuple[WayError, ...]
    merged: Merged | None = None
    quantised: Written | None = None
    comparison: Comparison | None = None


def merge_into(
    graph: Graph,
    source: Source,
    out: str | Path,
    *,
    into: str = "dequant",
    form: str = "",
    calibration: str | Path = "",
    accept_error: bool = False,
    tokenizer: Any = None,
    tell: Callable[[tuple[WayError, ...]], None] = lambda found: None,
    overwrite: bool = False,
    **options: Any,
) -> Into:
    """Merge the adapters of a quantised graph one way; what every way would lose is told before anything is written.

    Args:
        graph: an adapted graph over weights held in codes.
        source: the base.
        out: the new folder.
        into: one of `WAYS`.
        form: of codes, see `surgeon.forms`; "" for the quantiser's default.
        calibration: a data file: requantised codes are GPTQ's on it.
        accept_error: write it even if the outputs are further off than `LIMIT`, or zero points must be rounded.
        tokenizer: makes the probes.
        tell: called with the errors.
        overwrite: replace an existing folder.
        options: of `surgeon.lower.merge.merge`, for the ways that write floating-point weights.

    Raises:
        UsageError: the base is not quantised, there is no such way, or the way cannot be done.
        CheckFailed: the error is over the limit, or what was written does not read as what was meant.
    """
    if into not in WAYS:
        raise UsageError(f"there is no way to merge into '{into}'", "--into", f"one of {', '.join(WAYS)}")
    if not is_quantised(graph):
        raise UsageError("the base is not quantised: there is one way to merge", "--into", "leave it out")
    probes, release = make_probes(graph, tokenizer), source.checkpoint.release
    ways = dict(way_graphs(graph, Again(form, str(calibration))))
    found = errors(graph, probes, release, ways)
    tell(found)
    chosen = next(item for item in found if item.way == into)
    _require(chosen, found, str(out), accept_error)
    if into in ("dequant", "original") and not isinstance(source.checkpoint, CodedCheckpoint):
        plain = graph if into == "dequant" else without(graph, holders(graph))
        return Into(into, found, merge(plain, source, out, overwrite=overwrite, tokenizer=tokenizer, **options))
    made = ways[into]
    assert isinstance(made, Graph)
    if holders(made):
        made = _fit(made, form, probes, release, str(out), accept_error)
    replay = Replay(made, source, probes, Path(out))
    scaled = context.update(graph.config, source.checkpoint.config) if graph.context else {}
    written = write_quantised(
        made, source, out, form=form, overwrite=overwrite, weights=graph.values, check=replay,
        config_update=head_config(graph) | scaled,
    )  # fmt: skip
    return Into(into, found, quantised=written, comparison=replay.comparison)


def _fit(
    made: Graph, form: str, probes: Sequence[Probe], release: Callable[[], None], where: str, accept_error: bool
) -> Graph:
    """The graph as the form holds it; refused with the measured damage if zero points must be rounded for that."""
    saved = Saved(made, form)
    wrong = misfit(made, saved, probes, release)
    if wrong is not None and not accept_error:
        wrong.refuse(where)
    return fitted(made, saved)


def _require(chosen: WayError, found: Sequence[WayError], where: str, accept_error: bool) -> None:
    if chosen.why:
        can = [item.way for item in found if not item.why]
        raise UsageError(f"--into {chosen.way} cannot be done: {chosen.why}", where, f"one of {', '.join(can)}")
    if chosen.error > LIMIT and not accept_error:
        best = min((item for item in found if not item.why), key=lambda item: item.error)
        raise CheckFailed(
            f"--into {chosen.way} changes the outputs by {chosen.error:.2%}, more than {LIMIT:.0%}",
            where,
            f"--into {best.way} changes them by {best.error:.2g}; or --accept-error. Nothing was written",
        )
