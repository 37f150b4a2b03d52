"""What the linears have to do for a batch: which tokens meet which rows of the pool, made once for a site's table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgeon.remembered import Remembered
from surgeon.serve.packed import BIAS, FIRST_A, FIRST_B, INPUT, LOW, OUT, OUTPUT, PARTS, RANK

MANY = 8
"""Tokens with the same rows from which two matrix products beat one product per row."""


@dataclass(frozen=True)
class Group:
    """Neighbouring tokens that share their rows.

    Attributes:
        tokens: which.
        a: rows of A in the pool's view of their width, `[r]`, or their slice where they are neighbours.
        b: rows of B.
        scale: of each token, `[n, 1]`.
        rank: r, of B where processes share A.
    """

    tokens: slice
    a: torch.Tensor | slice
    b: torch.Tensor | slice
    scale: torch.Tensor
    rank: int


@dataclass
class Single:
    """Tokens that meet their rows one by one, as the rows of a sparse matrix.

    Attributes:
        starts: where each token's rows of A begin, `[n + 1]`.
        a: rows of A, `[m]`.
        scale: of each, `[m]`.
        up_starts: where its rows of B begin, `[n + 1]`.
        b: rows of B, `[parts · m]`.
        order: where processes share A: the products of each row of B among those of all processes, one after another.
    """

    starts: torch.Tensor
    a: torch.Tensor
    scale: torch.Tensor
    up_starts: torch.Tensor
    b: torch.Tensor
    order: torch.Tensor | None
    _patterns: tuple[torch.Tensor, torch.Tensor] | None = None

    def patterns(self, a_rows: int, b_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows of A and of B each token meets, sparse matrices over all rows of the pool, made once.

        The values of the second are written anew at every use.
        """
        if self._patterns is None:
            count = len(self.starts) - 1
            self._patterns = (
                _sparse(self.starts, self.a, self.scale, (count, a_rows)),
                _sparse(self.up_starts, self.b, self.scale.new_zeros(len(self.b)), (count, b_rows)),
            )
        return self._patterns


def _sparse(starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


@dataclass(frozen=True)
class Vectors:
    """One vector for each of some tokens.

    Attributes:
        tokens: which, `[n]`.
        rows: of the vectors, `[n]`.
    """

    tokens: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Low:
    """Vectors l of tokens of one rank.

    Attributes:
        tokens: which, `[n]`.
        rows: of the vectors in the pool's view of the rank's width, `[n]`.
        rank: r.
        places: of their entries among those of `Single`, `[n, r]`, −1 where the token is in a group.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    rank: int
    places: torch.Tensor


@dataclass(frozen=True)
class Work:
    """What one site has to do for a batch; it follows from the site's table and is made once for it."""

    single: Single | None
    groups: tuple[Group, ...]
    low: tuple[Low, ...]
    out: Vectors | None
    input: Vectors | None
    output: Vectors | None
    bias: Vectors | None


def work(
    rows: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, owners: torch.Tensor, sampled: bool, each: bool
) -> Work | None:
    """The work of a site; None where no token has an adapter there.

    Args:
        rows: numbers of the rows of all adapters of the batch.
        table: `[adapters, WIDTH]`, see `surgeon.serve.packed`; the numbers are places in `rows`.
        scales: `[adapters]`.
        owners: the adapter of each token `[n]`, −1 for the base alone; tokens of one stand together.
        sampled: whether the sampled product exists for the dtype and device.
        each: every token by itself, whatever its neighbours are.
    """
    return _made(rows, table, scales, owners, sampled=sampled, each=each)


def _work(
    rows: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, owners: torch.Tensor, *, sampled: bool, each: bool
) -> Work | None:
    if not len(table):
        return None
    lines, weights = table.tolist(), scales.tolist()
    if all(line[RANK] == 0 and max(line[INPUT], line[OUTPUT], line[BIAS]) < 0 for line in lines):
        return None
    runs = [run for run in _runs(owners.tolist()) if run[2] >= 0]
    joined = [(i, i + 1, who) for a, b, who in runs for i in range(a, b)] if each else _joined(runs, lines)
    many = 1 if not sampled else MANY
    groups = [run for run in joined if lines[run[2]][RANK] and run[1] - run[0] >= many]
    dense = [(start, stop) for start, stop, _ in groups]
    alone = [run for run in runs if lines[run[2]][RANK] and not any(a <= run[0] < b for a, b in dense)]
    single = _single(alone, lines, weights, rows, len(owners))
    vectors = (_vectors(runs, lines, name, rows) for name in (OUT, INPUT, OUTPUT, BIAS))
    made = tuple(_group(run, runs, lines, weights, rows) for run in groups)
    return Work(single, made, _low(runs, alone, lines, rows, single), *vectors)


Run = tuple[int, int, int]


def _runs(owners: list[int]) -> list[Run]:
    """(start, stop, adapter) of neighbours with one adapter."""
    found: list[Run] = []
    for position, owner in enumerate(owners):
        if found and found[-1][2] == owner:
            found[-1] = (found[-1][0], position + 1, owner)
        else:
            found.append((position, position + 1, owner))
    return found


def _joined(runs: list[Run], lines: list[list[int]]) -> list[Run]:
    """Neighbouring runs that share their rows are one."""
    found: list[Run] = []
    for start, stop, owner in runs:
        same = found and found[-1][1] == start and lines[found[-1][2]][:LOW] == lines[owner][:LOW]
        if same:
            found[-1] = (found[-1][0], stop, found[-1][2])
        else:
            found.append((start, stop, owner))
    return found


def _group(run: Run, runs: list[Run], lines: list[list[int]], weights: list[float], rows: torch.Tensor) -> Group:
    start, stop, owner = run
    scale = [weights[other] for a, b, other in runs if start <= a < stop for _ in range(a, b)]
    first_a, first_b, rank = lines[owner][FIRST_A], lines[owner][FIRST_B], lines[owner][RANK]
    column, whole = torch.tensor(scale, device=rows.device)[:, None], rank * lines[owner][PARTS]
    a, b = (_neighbours(rows[first : first + count]) for first, count in ((first_a, rank), (first_b, whole)))
    return Group(slice(start, stop), a, b, column, whole)


def _neighbours(rows: torch.Tensor) -> torch.Tensor | slice:
    """Rows one after another as a slice: reading it makes no copy."""
    first, count = int(rows[0]), len(rows)
    if torch.equal(rows, torch.arange(first, first + count, device=rows.device)):
        return slice(first, first + count)
    return rows


def _single(
    runs: list[Run], lines: list[list[int]], weights: list[float], rows: torch.Tensor, count: int
) -> Single | None:
    """The tokens of runs; an adapter that has several finds its rows once for each."""
    if not runs:
        return None
    ranks = [0] * count
    a: list[int] = []
    b: list[int] = []
    scale: list[float] = []
    parts = max(lines[owner][PARTS] for *_, owner in runs)
    for start, stop, owner in runs:
        first_a, first_b, rank = lines[owner][FIRST_A], lines[owner][FIRST_B], lines[owner][RANK]
        for token in range(start, stop):
            ranks[token] = rank
            a += range(first_a, first_a + rank)
            b += range(first_b, first_b + rank * parts)
            scale += [weights[owner]] * rank
    starts = torch.zeros(count + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(ranks), 0, out=starts[1:])
    order = _order(ranks, parts, len(a)) if parts > 1 else None
    wanted, given = rows[torch.tensor(a)], rows[torch.tensor(b)]
    return Single(starts, wanted, torch.tensor(scale), starts * parts, given, order)


def _order(ranks: list[int], parts: int, products: int) -> torch.Tensor:
    """The products of a token by all processes, one process after the other, token after token."""
    found, start = list[int](), 0
    for rank in ranks:
        found += [part * products + start + row for part in range(parts) for row in range(rank)]
        start += rank
    return torch.tensor(found)


def _low(
    runs: list[Run], alone: list[Run], lines: list[list[int]], rows: torch.Tensor, single: Single | None
) -> tuple[Low, ...]:
    """The vectors l, rank by rank."""
    lonely = {token for a, b, _ in alone for token in range(a, b)}
    starts = single.up_starts.tolist() if single is not None else []
    found: dict[int, list[tuple[int, int, int]]] = {}
    for a, b, owner in runs:
        if lines[owner][LOW] >= 0 and lines[owner][RANK]:
            for token in range(a, b):
                place = starts[token] if token in lonely else -1
                whole = lines[owner][RANK] * lines[owner][PARTS]
                found.setdefault(whole, []).append((token, lines[owner][LOW], place))
    made = []
    for rank, listed in found.items():
        tokens, places, first = torch.tensor(listed, device=rows.device).unbind(1)
        inside = torch.where(first[:, None] < 0, -1, first[:, None] + torch.arange(rank, device=rows.device))
        made.append(Low(tokens.contiguous(), rows[places], rank, inside))
    return tuple(made)


def _vectors(runs: list[Run], lines: list[list[int]], name: int, rows: torch.Tensor) -> Vectors | None:
    found = [(token, lines[owner][name]) for a, b, owner in runs if lines[owner][name] >= 0 for token in range(a, b)]
    if not found:
        return None
    tokens, places = torch.tensor(found, device=rows.device).unbind(1)
    return Vectors(tokens.contiguous(), rows[places])


_made = Remembered(_work)
