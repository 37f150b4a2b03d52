"""Ways to merge over a quantised base, each with its error before anything is written.

    dequant      what the codes decode to + the adapter, in the base's own dtype: what the adapter was trained on
    original     the original weights + the adapter: another model, by the error of the quantisation
    requant      original + adapter, quantised again: small adapters vanish between the points of the grid
    zero-points  codes and scales as they are, the adapter in the zero points: exact, where it is constant over groups

Errors are ‖found − expected‖ / ‖expected‖ against the adapted model, of its outputs on probes and of every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon import run
from surgeon.coded import CodedCheckpoint
from surgeon.errors import CheckFailed, SurgeonError, UnsupportedError, UsageError
from surgeon.fold import by_weight, fold, folds, normals, stacked, value_of
from surgeon.graph import Graph
from surgeon.hold import holders
from surgeon.lower.held import held_names
from surgeon.lower.merge import Merged, merge
from surgeon.lower.quantised import Written, write_quantised
from surgeon.passes.quantiser import Quantiser
from surgeon.sites import sites
from surgeon.source import Source
from surgeon.strip import without
from surgeon.verification import Probe, make_probes, outputs
from surgeon.zero_points import fold_zero_points

WAYS = ("dequant", "original", "requant", "zero-points")
LIMIT = 0.02
"""Relative error of the outputs above which a merge is refused unless it is accepted."""


@dataclass(frozen=True)
class WayError:
    """What one way would lose.

    Attributes:
        way: one of `WAYS`.
        why: why it cannot be done, or "".
        error: relative error of the outputs.
        token_agreement: share of positions with the same best token.
        weights: relative error of each weight that is held in codes.
    """

    way: str
    why: str = ""
    error: float = 0.0
    token_agreement: float = 1.0
    weights: Mapping[str, float] | None = None

    @property
    def worst(self) -> tuple[str, float]:
        """The weight with the largest error."""
        return max((self.weights or {"": 0.0}).items(), key=lambda item: item[1])


@dataclass(frozen=True)
class Into:
    """A merge over a quantised base: how it was done, what each way would have lost, and what was written."""

    way: str
    errors: tuple[WayError, ...]
    merged: Merged | None = None
    quantised: Written | None = None


def is_quantised(graph: Graph) -> bool:
    """Whether weights of the base are held in codes."""
    return bool(holders(graph))


def way_graphs(graph: Graph) -> Iterator[tuple[str, Graph | str]]:
    """Every way with the graph it makes, or why it cannot be done."""
    makers: dict[str, Callable[[], Graph]] = {
        "dequant": lambda: fold(graph),
        "original": lambda: _original(graph),
        "requant": lambda: _requantised(graph),
        "zero-points": lambda: fold_zero_points(graph),
    }
    for way in WAYS:
        try:
            yield way, makers[way]()
        except SurgeonError as error:
            yield way, f"{error.what} ({error.where})"


def errors(graph: Graph, probes: Sequence[Probe], release: Callable[[], None] = lambda: None) -> tuple[WayError, ...]:
    """What each way of merging `graph` would lose, on probes and per weight; one weight in memory at a time."""
    expected = outputs(graph, probes, release)
    found = []
    for way, made in way_graphs(graph):
        if isinstance(made, str):
            found.append(WayError(way, why=made))
            continue
        results = outputs(made, probes, release)
        pairs = [pair for e, r in zip(expected, results, strict=True) for pair in zip(e, r, strict=True)]
        wrong = sum(float((r - e).square().sum()) for e, r in pairs) ** 0.5
        size = sum(float(e.square().sum()) for e, _ in pairs) ** 0.5
        same = [(e[0].argmax(-1) == r[0].argmax(-1)).float().mean() for e, r in zip(expected, results, strict=True)]
        agreement = float(torch.stack(same).mean())
        found.append(WayError(way, "", wrong / max(size, 1e-30), agreement, _weight_errors(graph, made)))
        release()
    return tuple(found)


def merge_into(
    graph: Graph,
    source: Source,
    out: str | Path,
    *,
    into: str = "dequant",
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
        accept_error: write it even if the outputs are further off than `LIMIT`.
        tokenizer: makes the probes.
        tell: called with the errors.
        overwrite: replace an existing folder.
        options: of `surgeon.lower.merge.merge`, for the ways that write floating-point weights.

    Raises:
        UsageError: the base is not quantised, there is no such way, or the way cannot be done.
        CheckFailed: the error is over the limit.
    """
    if into not in WAYS:
        raise UsageError(f"there is no way to merge into '{into}'", "--into", f"one of {', '.join(WAYS)}")
    if not is_quantised(graph):
        raise UsageError("the base is not quantised: there is one way to merge", "--into", "leave it out")
    found = errors(graph, make_probes(graph, tokenizer), source.checkpoint.release)
    tell(found)
    chosen = next(item for item in found if item.way == into)
    _require(chosen, found, str(out), accept_error)
    if into in ("dequant", "original") and not isinstance(source.checkpoint, CodedCheckpoint):
        plain = graph if into == "dequant" else without(graph, holders(graph))
        return Into(into, found, merge(plain, source, out, overwrite=overwrite, tokenizer=tokenizer, **options))
    made = dict(way_graphs(graph))[into]
    assert isinstance(made, Graph)
    return Into(into, found, quantised=write_quantised(made, source, out, overwrite=overwrite, weights=graph.values))


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


def _requantised(graph: Graph) -> Graph:
    """From the original weights where there are any."""
    merged = fold(graph) if _is_coded(graph) else _original(graph)
    return run.apply(merged, *_quantisers(graph))


def _is_coded(graph: Graph) -> bool:
    weights = getattr(graph.values, "weights", None)
    return isinstance(getattr(weights, "checkpoint", None), CodedCheckpoint)


def _original(graph: Graph) -> Graph:
    if _is_coded(graph):
        what = "the base was saved quantised, its original weights are not in it"
        raise UnsupportedError(what, graph.source, "--into dequant")
    return fold(without(graph, holders(graph)))


def _quantisers(graph: Graph) -> list[Quantiser]:
    return [step for step in graph.applied if isinstance(step, Quantiser)]


def _weight_errors(graph: Graph, made: Graph) -> dict[str, float]:
    groups, at = by_weight(graph, folds(graph)), {site.weight: site for site in sites(graph)}
    found = {}
    for name in held_names(graph):
        site, group = at[name], groups.get(name, [])
        weight = site.matrix(value_of(graph, name).float())
        expected = stacked(weight, normals(group, lambda w=weight: w, lambda: None)) if group else weight  # type: ignore[misc]
        wrong = site.matrix(value_of(made, name).float()) - expected
        found[name] = float(wrong.norm() / expected.norm().clamp(min=1e-30))
    return found
