"""Adapters over N processes as S-LoRA splits them (§6), so that they ask each other for numbers of rank r only.

    COLUMN   A by rows [r / N, in], all-gather of x Aᵀ, B by outputs [r, out / N]
    ROW      A by inputs [r, in / N], all-reduce of x Aᵀ, B by outputs [r, out / N]: the process's share of the sum,
             which the all-reduce of the base's output completes

Ranks that N does not divide are filled with rows of zeros. Attentions' learned columns are split by heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional as F

from surgeon.graph import Graph
from surgeon.normal import Columns
from surgeon.serve.adapters import Loader
from surgeon.serve.layout import Layout
from surgeon.serve.packed import (
    BANKED,
    BIAS,
    FIRST_A,
    FIRST_B,
    INPUT,
    LOW,
    OUT,
    OUTPUT,
    PARTS,
    RANK,
    WIDTH,
    Packed,
    Packer,
)
from surgeon.serve.partition import COLUMN, ROW, WHOLE, Share

_SPLIT = {
    (COLUMN, OUT), (COLUMN, OUTPUT), (COLUMN, BIAS), (ROW, OUT), (ROW, INPUT),
}  # fmt: skip
"""Vectors of which a process has its part; the others are the same for all."""


Bank = tuple[Packed, dict[tuple[str, int, int], int]]
"""A process's part of shared matrices, and (role, FIRST_A or FIRST_B, first row of the whole) → its own first row."""


class Splitter:
    """Cuts adapters for one process; what several share is cut once."""

    def __init__(self, layout: Layout, roles: Mapping[str, str], share: Share) -> None:
        self.roles = [roles.get(site.path, WHOLE) for site in layout.linears]
        self.share = share
        self._banks: dict[str, Bank] = {}

    def cut(self, whole: Packed) -> Packed:
        """A process's part of an adapter."""
        packer = Packer(next((rows.dtype for rows in whole.rows.values()), torch.float32))
        tickets = dict[tuple[int, int], tuple[int, int]]()
        table = whole.table.clone()
        bank = self._bank(whole) if whole.bank is not None else None
        for number, line in enumerate(whole.table.tolist()):
            role = self.roles[number]
            if line[RANK] > 0:
                table[number, RANK], table[number, PARTS] = self._rank(line[RANK], role), self._parts(role)
                if line[BANKED] and bank is not None:
                    for name in (FIRST_A, FIRST_B):
                        table[number, name] = bank[1][role, name, line[name]]
                else:
                    for name, rows in zip((FIRST_A, FIRST_B), self._matrices(whole, line, role), strict=True):
                        tickets[number, name] = packer.add(rows)
            for name in (LOW, OUT, INPUT, OUTPUT, BIAS):
                if line[name] >= 0:
                    tickets[number, name] = packer.add(self._vector(whole, line, name, role))
        virtual = packer.add(whole.matrix(*whole.virtual)) if whole.virtual[1] else None
        biases = {number: packer.add(self._scores(whole, number)) for number in whole.column_bias}
        for (number, name), ticket in tickets.items():
            table[number, name] = packer.number(ticket)
        return dataclasses.replace(
            whole, rows=packer.rows(), table=table, bank=bank[0] if bank is not None else None, whole=whole,
            columns={number: self._columns(columns) for number, columns in whole.columns.items()},
            column_bias={number: packer.number(ticket) for number, ticket in biases.items()},
            virtual=(packer.number(virtual) if virtual is not None else 0, whole.virtual[1]),
        )  # fmt: skip

    def _parts(self, role: str) -> int:
        return self.share.size if role == COLUMN else 1

    def _rank(self, rank: int, role: str) -> int:
        """Rows of A that a process has."""
        return -(-rank // self._parts(role))

    def _matrices(self, whole: Packed, line: list[int], role: str) -> tuple[torch.Tensor, torch.Tensor]:
        rank = line[RANK]
        a, b = (whole.matrix(line[name], rank) for name in (FIRST_A, FIRST_B))
        if role == WHOLE:
            return a, b
        b = self.share.of(b, 1)
        if role == ROW:
            return self.share.of(a, 1), b
        missing = self._rank(rank, role) * self.share.size - rank
        a, b = (F.pad(matrix, (0, 0, 0, missing)) for matrix in (a, b))
        return self.share.of(a, 0), b

    def _vector(self, whole: Packed, line: list[int], name: int, role: str) -> torch.Tensor:
        vector = whole.matrix(line[name], 1)[0]
        if (role, name) in _SPLIT:
            return self.share.of(vector, 0)
        if name == LOW and role == COLUMN:
            return F.pad(vector, (0, self._rank(line[RANK], role) * self.share.size - line[RANK]))
        if name == BIAS and role == ROW and self.share.rank:
            return torch.zeros_like(vector)
        return vector

    def _columns(self, columns: Columns) -> Columns:
        return dataclasses.replace(columns, k=self.share.of(columns.k, 0), v=self.share.of(columns.v, 0))

    def _scores(self, whole: Packed, number: int) -> torch.Tensor:
        """The biases of a process's heads for the columns of an attention."""
        columns = whole.columns[number].k.shape[1]
        heads = whole.matrix(whole.column_bias[number], 1).view(-1, columns)
        return self.share.of(heads, 0).reshape(1, -1)

    def _bank(self, whole: Packed) -> Bank:
        """A process's part of the matrices that adapters share; what another adapter reads more of them is one more."""
        assert whole.bank is not None
        places: dict[tuple[str, int, int], tuple[list[int], int]] = {}
        for role, line in zip(self.roles, whole.table.tolist(), strict=True):
            if line[BANKED] and line[RANK] > 0:
                places |= {(role, name, line[name]): (line, side) for side, name in enumerate((FIRST_A, FIRST_B))}
        key = f"{whole.bank.key} {sorted(places)}"
        if key not in self._banks:
            packer = Packer(next(iter(whole.bank.rows.values())).dtype)
            tickets = {
                place: packer.add(self._matrices(whole.bank, line, place[0])[side])
                for place, (line, side) in sorted(places.items())
            }
            empty = torch.zeros(0, WIDTH, dtype=torch.int64), torch.zeros(0)
            made = Packed(key, packer.rows(), *empty, whole=whole.bank)
            self._banks[key] = (made, {place: packer.number(ticket) for place, ticket in tickets.items()})
        return self._banks[key]


class SplitLoader(Loader):
    """Reads adapters and keeps the part of this process, with the whole to send to the others."""

    def __init__(self, base: Graph, layout: Layout, dtype: torch.dtype, splitter: Splitter) -> None:
        super().__init__(base, layout, dtype)
        self.splitter = splitter

    def load(self, folder: str | Path, key: str, rank: int | None = None) -> Packed:
        """As `Loader.load`, the part of this process."""
        return self.splitter.cut(super().load(folder, key, rank))
