"""Layered layout of a directed graph: ranks, few crossings, straight lines (Sugiyama, Tagawa & Toda 1981)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

_SWEEPS, _ORDERING = 120, 20
_LANE = 10.0  # width kept free for an edge that passes a rank
_CENTRING = 0.8  # boxes are drawn to the axis, or a long edge on one side would push each row further out
_STIFF = 12.0  # how much more a lane's place counts than a box's: long edges come out straight


@dataclass(frozen=True)
class Layout:
    """Where things go.

    Attributes:
        x: centre of each box.
        rank: row of each box.
        lanes: for each edge the x of its bends, one per row it passes.
        width: of the whole.
        rows: how many.
    """

    x: list[float]
    rank: list[int]
    lanes: dict[tuple[int, int], list[float]]
    width: float
    rows: int


def layout(widths: Sequence[float], reads: Sequence[Sequence[int]], gap: float = 22) -> Layout:
    """Place boxes of these widths, box i below every box in `reads[i]` (whose indices are smaller)."""
    rank = [0] * len(widths)
    for box, sources in enumerate(reads):
        rank[box] = max((rank[source] + 1 for source in sources), default=0)
    sizes, edges, rows, paths = list(widths), list[tuple[int, int]](), _rows(rank), {}
    for box, sources in enumerate(reads):
        for source in sources:
            chain = [source]
            for row in range(rank[source] + 1, rank[box]):
                rows[row].append(len(sizes))
                chain.append(len(sizes))
                sizes.append(_LANE)
            chain.append(box)
            edges += itertools.pairwise(chain)
            paths[source, box] = chain[1:-1]
    x = _placed(rows, sizes, edges, gap)
    lanes = {edge: [x[item] for item in chain] for edge, chain in paths.items()}
    right = max((x[i] + sizes[i] / 2 for i in range(len(sizes))), default=0.0)
    return Layout(x[: len(widths)], rank, lanes, right, len(rows))


def _rows(rank: list[int]) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(max(rank, default=-1) + 1)]
    for box, row in enumerate(rank):
        rows[row].append(box)
    return rows


def _placed(rows: list[list[int]], sizes: list[float], edges: list[tuple[int, int]], gap: float) -> list[float]:
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for source, target in edges:
        above.setdefault(target, []).append(source)
        below.setdefault(source, []).append(target)
    x = [0.0] * len(sizes)
    for row in rows:
        _spread(row, [0.0] * len(row), x, sizes, gap)
    for sweep in range(_SWEEPS):
        near = above if sweep % 2 == 0 else below
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = [_mean([x[item] for item in near.get(box, [])], x[box]) for box in row]
            if sweep < _ORDERING:
                order = sorted(range(len(row)), key=lambda i: wanted[i])
                row[:] = [row[i] for i in order]
                wanted = [wanted[i] for i in order]
            else:
                both = [[*above.get(box, []), *below.get(box, [])] for box in row]
                wanted = [_mean([x[item] for item in items], x[box]) for items, box in zip(both, row, strict=True)]
            wanted = [w if sizes[box] == _LANE else _CENTRING * w for w, box in zip(wanted, row, strict=True)]
            _spread(row, wanted, x, sizes, gap)
    left = min((x[i] - sizes[i] / 2 for i in range(len(sizes))), default=0.0)
    return [value - left for value in x]


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _spread(row: list[int], wanted: list[float], x: list[float], sizes: list[float], gap: float) -> None:
    """The places nearest to the wanted ones, in order and without overlap (pooling adjacent violators)."""
    offsets, total = [], 0.0
    for previous, box in zip([None, *row], row, strict=False):
        total += 0.0 if previous is None else (sizes[previous] + sizes[box]) / 2 + gap
        offsets.append(total)
    pools: list[tuple[float, float, int]] = []  # weighted sum of wanted places, weight, number of boxes
    for box, want, offset in zip(row, wanted, offsets, strict=True):
        weight = _STIFF if sizes[box] == _LANE else 1.0
        pool = (weight * (want - offset), weight, 1)
        while pools and pools[-1][0] / pools[-1][1] > pool[0] / pool[1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    places = [total / weight for total, weight, count in pools for _ in range(count)]
    for box, place, offset in zip(row, places, offsets, strict=True):
        x[box] = place + offset
