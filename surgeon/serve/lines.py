"""The table of an adapter while it is made: where each linear finds its rows."""

from __future__ import annotations

import torch

from surgeon.errors import UnsupportedError
from surgeon.normal import Factors, Normal
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

MERGE = "merge it (surgeon merge) and serve the merged model"


class Lines:
    """Tickets of a packer, and numbers once all rows are in."""

    def __init__(self, count: int) -> None:
        self._tickets: dict[tuple[int, int], tuple[int, int]] = {}
        self._ranks = [0] * count
        self._scales = [1.0] * count
        self._banked: dict[int, tuple[int, int]] = {}

    def normal(self, number: int, normal: Normal, packer: Packer) -> None:
        """A site's normal form.

        Raises:
            UnsupportedError: rows of the weight are replaced.
        """
        normal = normal.factored()
        if normal.replaced is not None:
            raise UnsupportedError("the adapter replaces rows of a weight", "", MERGE)
        if normal.a is not None and normal.b is not None and len(normal.a):
            a = normal.a.repeat_interleave(normal.group, -1) if normal.group > 1 else normal.a
            self._tickets[number, FIRST_A] = packer.add(a)
            self._tickets[number, FIRST_B] = packer.add(normal.b.T)
            self._ranks[number], self._scales[number] = len(a), normal.scale / normal.divisor
        for name, vector in ((INPUT, normal.u), (OUTPUT, normal.s), (BIAS, normal.bias)):
            if vector is not None:
                self.vector(number, name, vector, packer)

    def shared(self, number: int, factors: Factors, packer: Packer) -> None:
        """The vectors of a site whose matrices are in a bank."""
        self._ranks[number] = len(factors.low)
        self.vector(number, LOW, factors.low, packer)
        self.vector(number, OUT, factors.out, packer)

    def vector(self, number: int, name: int, vector: torch.Tensor, packer: Packer) -> None:
        """One vector of a site."""
        self._tickets[number, name] = packer.add(vector)

    def banked(self, sites: dict[int, Factors], bank: tuple[Packed, dict[tuple[str, int], int]]) -> None:
        """Where the matrices of sites are in their bank."""
        for number, factors in sites.items():
            self._banked[number] = (bank[1]["a", factors.a.shape[1]], bank[1]["b", factors.b.shape[0]])

    def table(self, packer: Packer) -> tuple[torch.Tensor, torch.Tensor]:
        """`[linears, WIDTH]` and the scales."""
        lines = torch.full((len(self._ranks), WIDTH), -1, dtype=torch.int64)
        lines[:, RANK] = torch.tensor(self._ranks, dtype=torch.int64)
        lines[:, BANKED], lines[:, PARTS] = 0, 1
        for (number, name), ticket in self._tickets.items():
            lines[number, name] = packer.number(ticket)
        for number, (first_a, first_b) in self._banked.items():
            lines[number, FIRST_A], lines[number, FIRST_B], lines[number, BANKED] = first_a, first_b, 1
        return lines, torch.tensor(self._scales)
