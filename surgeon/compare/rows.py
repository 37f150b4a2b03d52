"""The table of a comparison: one row per method, out of the results of its runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.compare.contenders import Contender
from surgeon.compare.schedule import BESIDE, PACE, PEFT, SEARCH, SURGEON, Result, Results, Run

AFTER = ("merged", "4bit", "onnx")


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and their standard deviation (0 for one)."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of these values."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


@dataclass(frozen=True)
class Peer:
    """The same runs through PEFT: its loss reduction, and surgeon's share of its reduction, step time and memory.

    Times are of steps taken in turn; memory is compared seed by seed. The median pair counts.
    """

    reduction: Spread
    reduction_ratio: float
    time_ratio: float
    memory_ratio: float | None


@dataclass(frozen=True)
class Row:
    """What one method costs and gives.

    Attributes:
        method: its name.
        options: that it was given.
        lr: that the search found.
        seeds: how many runs.
        trained: parameters that training changed.
        stored: numbers in its file.
        checkpoint_bytes: of that file.
        seconds_per_step: median of steps that are timed apart from the runs.
        memory_bytes: the peak in training above the process without a model.
        loss: on the held-out data.
        reduction: the fall of that loss from the base's.
        accuracy: on the held-out data: of tokens or of classes.
        first_loss: of the first seed.
        after: way of deploying → loss of the first seed, or why there is none.
        diff: what it changed in the graph.
        peer: PEFT's side.
        without_peer: why there is none, where it was asked for.
    """

    method: str
    options: Mapping[str, Any]
    lr: float
    seeds: int
    trained: int
    stored: int
    checkpoint_bytes: int
    seconds_per_step: float
    memory_bytes: float
    loss: Spread
    reduction: Spread
    accuracy: float | None
    first_loss: float
    after: Mapping[str, float | str]
    diff: str
    peer: Peer | None = None
    without_peer: str = ""


def rows(
    contenders: Sequence[Contender], base: Result, results: Results, seeds: int
) -> tuple[list[Row], dict[str, str]]:
    """The rows of methods that ran, by loss, and why the others did not."""
    found: list[Row] = []
    failed: dict[str, str] = {}
    for one in contenders:
        search = results.read(Run(SEARCH, one.name)) or {}
        own = [result for seed in range(seeds) if (result := results.read(Run(SURGEON, one.name, (), seed)))]
        pace = next(filter(None, (results.read(Run(kind, one.name)) for kind in (BESIDE, PACE))), {})
        bad = next((str(result["failed"]) for result in (search, *own, pace) if "failed" in result), "")
        if bad:
            failed[one.name] = bad
        elif own:
            peers = [result for seed in range(seeds) if (result := results.read(Run(PEFT, one.name, (), seed)))]
            found.append(_row(one, base, own, peers, pace))
    return sorted(found, key=lambda row: row.loss.mean), failed


def _row(one: Contender, base: Result, own: Sequence[Result], peers: Sequence[Result], pace: Result) -> Row:
    first = own[0]
    why = next((str(result["failed"]) for result in peers if "failed" in result), "")
    accuracies = [result["accuracy"] for result in own if "accuracy" in result]
    return Row(
        method=one.name,
        options=dict(one.options),
        lr=first["lr"],
        seeds=len(own),
        trained=first["trained"],
        stored=first["stored"],
        checkpoint_bytes=first["checkpoint_bytes"],
        seconds_per_step=pace["seconds_per_step"],
        memory_bytes=statistics.mean(result["memory_bytes"] for result in own),
        loss=Spread.of([result["loss"] for result in own]),
        reduction=Spread.of([base["loss"] - result["loss"] for result in own]),
        accuracy=statistics.mean(accuracies) if accuracies else None,
        first_loss=first["loss"],
        after=first.get("after", {}),
        diff=first.get("diff", ""),
        peer=_peer(base, own, peers, pace) if peers and not why else None,
        without_peer=why,
    )


def _peer(base: Result, own: Sequence[Result], peers: Sequence[Result], pace: Result) -> Peer:
    count = min(len(own), len(peers))
    falls = [base["loss"] - result["loss"] for result in peers[:count]]
    ours = statistics.mean(base["loss"] - result["loss"] for result in own[:count])
    pairs = [(mine["memory_bytes"], theirs["memory_bytes"]) for mine, theirs in zip(own, peers, strict=False)]
    memory = [mine / theirs for mine, theirs in pairs if theirs]
    fall = statistics.mean(falls)
    return Peer(
        reduction=Spread.of(falls),
        reduction_ratio=ours / fall if fall else 0.0,
        time_ratio=pace["time_ratio"],
        memory_ratio=statistics.median(memory) if memory else None,
    )
