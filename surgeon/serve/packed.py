"""An adapter as the pool holds it: rows of numbers, and where each site finds its own among them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch

from surgeon.errors import SurgeonError
from surgeon.normal import Columns
from surgeon.serve.pool import pages_for

# Columns of a site's line in an adapter's table: row numbers, −1 for none.
FIRST_A, FIRST_B, RANK, LOW, OUT, INPUT, OUTPUT, BIAS, BANKED, PARTS = range(10)
WIDTH = 10


@dataclass(frozen=True, eq=False)
class Packed:
    """One adapter, or matrices that several adapters share, as rows.

    At a linear: y' = s ⊙ (y + o ⊙ (scale · ((u ⊙ x) Aᵀ ⊙ l) B)) + bias, A: `[r, in]`, B: `[r, out]`, with the vectors
    l `[r]`, o, s, bias `[out]` and u `[in]` left out where there is none. VeRA is A and B of a bank, and its own l
    and o; DoRA and IA³ have s, IA³ also u.

    Rows are numbered through all widths, widest first.

    Attributes:
        key: names it.
        rows: width → its rows `[n, width]`, in the pool's dtype; widest first.
        table: a line per linear of the layout, int64 `[linears, WIDTH]`: FIRST_A and FIRST_B (in the bank where BANKED)
            are the first of RANK rows each, LOW, OUT, INPUT, OUTPUT and BIAS the rows of l, o, u, s and bias. PARTS is
            1, or the processes that share the rows of A: B has RANK rows for each of them (see `surgeon.serve.shards`).
        scales: `[linears]`.
        bank: the matrices it shares.
        columns: attention → learned keys and values.
        column_bias: attention → row of its columns' biases `[queries, p]`.
        virtual: rows that stand before the tokens, (first, count).
        shift: where the tokens' positions begin.
        whole: what it is a part of, where processes share it.
    """

    key: str
    rows: dict[int, torch.Tensor]
    table: torch.Tensor
    scales: torch.Tensor
    bank: Packed | None = None
    columns: dict[int, Columns] = field(default_factory=dict)
    column_bias: dict[int, int] = field(default_factory=dict)
    virtual: tuple[int, int] = (0, 0)
    shift: int = 0
    whole: Packed | None = None

    @property
    def prefix(self) -> int:
        """The largest number of learned columns at an attention."""
        return max((columns.k.shape[1] for columns in self.columns.values()), default=0)

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(width, number of rows), widest first."""
        return [(width, len(rows)) for width, rows in self.rows.items()]

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of its numbers, those of its bank left out."""
        learned = [tensor for columns in self.columns.values() for tensor in (columns.k, columns.v)]
        own = sum(t.numel() * t.element_size() for t in (*self.rows.values(), *learned))
        return own + (self.whole.nbytes if self.whole is not None else 0)

    def matrix(self, first: int, count: int) -> torch.Tensor:
        """Rows by their number, `[count, width]`."""
        for rows in self.rows.values():
            if first < len(rows):
                return rows[first : first + count]
            first -= len(rows)
        raise SurgeonError(f"{self.key} has no row {first}")

    def pages(self, page: int, block: int) -> int:
        """Pages it needs in the pool, those of its bank left out."""
        learned = sum(-(-columns.k.shape[1] // block) for columns in self.columns.values())
        return pages_for(self.widths, page) + learned


class Packer:
    """Collects rows of any width and numbers them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._parts: dict[int, list[torch.Tensor]] = {}
        self._count: dict[int, int] = {}

    def add(self, rows: torch.Tensor) -> tuple[int, int]:
        """Rows `[n, width]`, or one `[width]`; returns a ticket for `number`."""
        rows = rows.reshape(-1, rows.shape[-1]).to(self.dtype)
        width = rows.shape[-1]
        ticket = (width, self._count.get(width, 0))
        self._parts.setdefault(width, []).append(rows)
        self._count[width] = ticket[1] + len(rows)
        return ticket

    def rows(self) -> dict[int, torch.Tensor]:
        """Width → rows, widest first."""
        return {width: torch.cat(self._parts[width]) for width in sorted(self._parts, reverse=True)}

    def number(self, ticket: tuple[int, int] | None) -> int:
        """The number of the first row of a ticket when everything is added; −1 for None."""
        if ticket is None:
            return -1
        return ticket[1] + sum(count for width, count in self._count.items() if width > ticket[0])
