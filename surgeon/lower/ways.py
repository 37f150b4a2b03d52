"""Ways to merge over a quantised base, each with its error before anything is written.

    dequant      what the codes decode to + the adapter, in the base's own dtype: what the adapter was trained on
    original     the original weights + the adapter: another model, by the error of the quantisation
    requant      original + adapter, quantised again: small adapters vanish between the points of the grid;
                 a calibration (`surgeon.gptq`) makes up for some of it
    zero-points  codes and scales as they are, the adapter in the zero points: exact, where it is constant over groups

Errors are ‖found − expected‖ / ‖expected‖ against the adapted model, of its outputs on probes and of every weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from surgeon import run
from surgeon.coded import CodedCheckpoint
from surgeon.errors import SurgeonError, UnsupportedError
from surgeon.fold import by_weight, fold, folds, normals, stacked, value_of
from surgeon.forms import find_writer
from surgeon.graph import Graph
from surgeon.hold import holders
from surgeon.lower.held import held_names
from surgeon.lower.saved import dtype_of, relative_error
from surgeon.passes.intq import IntQ
from surgeon.passes.quantiser import Quantiser
from surgeon.sites import sites
from surgeon.strip import without
from surgeon.verification import Probe, outputs
from surgeon.zero_points import fold_zero_points

WAYS = ("dequant", "original", "requant", "zero-points")


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
class Again:
    """How weights are quantised once more.

    Attributes:
        form: that they will be saved in, see `surgeon.forms`; "" for the default.
        calibration: a data file for GPTQ on the merged weights; "" for the nearest codes.
    """

    form: str = ""
    calibration: str = ""


def is_quantised(graph: Graph) -> bool:
    """Whether weights of the base are held in codes."""
    return bool(holders(graph))


def way_graphs(graph: Graph, again: Again = Again()) -> Iterator[tuple[str, Graph | str]]:
    """Every way with the graph it makes, or why it cannot be done."""
    makers: dict[str, Callable[[], Graph]] = {
        "dequant": lambda: fold(graph),
        "original": lambda: _original(graph),
        "requant": lambda: _requantised(graph, again),
        "zero-points": lambda: fold_zero_points(graph),
    }
    for way in WAYS:
        try:
            yield way, makers[way]()
        except SurgeonError as error:
            yield way, f"{error.what} ({error.where})"


def errors(
    graph: Graph,
    probes: Sequence[Probe],
    release: Callable[[], None] = lambda: None,
    ways: Mapping[str, Graph | str] | None = None,
) -> tuple[WayError, ...]:
    """What each way of merging `graph` would lose, on probes and per weight; one weight in memory at a time."""
    expected = outputs(graph, probes, release)
    found = []
    for way, made in (ways or dict(way_graphs(graph))).items():
        if isinstance(made, str):
            found.append(WayError(way, why=made))
            continue
        results = outputs(made, probes, release)
        same = [(e[0].argmax(-1) == r[0].argmax(-1)).float().mean() for e, r in zip(expected, results, strict=True)]
        agreement = float(torch.stack(same).mean())
        found.append(WayError(way, "", relative_error(expected, results), agreement, _weight_errors(graph, made)))
        release()
    return tuple(found)


def _requantised(graph: Graph, again: Again) -> Graph:
    """From the original weights where there are any."""
    merged = fold(graph) if _is_coded(graph) else _original(graph)
    return run.apply(merged, *(_anew(graph, step, again) for step in _quantisers(graph)))


def _anew(graph: Graph, step: Quantiser, again: Again) -> Quantiser:
    """A quantiser for other weights than it was made for, in the form that they are saved in."""
    if isinstance(step, IntQ):
        step = dataclasses.replace(step, calibration=again.calibration)
    elif again.calibration:
        raise UnsupportedError(f"{step.name} is not calibrated", "--calibration", "leave it out")
    return find_writer(again.form, step).suited(step, dtype_of(graph)) if again.form else step


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
