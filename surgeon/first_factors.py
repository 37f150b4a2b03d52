"""First values of a low-rank pair a `[r, in]`, b `[out, r]` that are made together, from the weight or from one draw.

"pissa" and "olora" begin with a part of the weight itself, and take it out of the base: W − s · b₀ a₀ + s · b a is W at
first. The pair a₀, b₀ stays beside a, b as it was; the base is not touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from surgeon.initial import generator_of
from surgeon.sites import Site

Pair = tuple[torch.Tensor, torch.Tensor]
Read = Callable[[], torch.Tensor]


@dataclass
class FirstPair:
    """a and b of one site, computed together when one of them is asked for, and forgotten when both have been.

    Attributes:
        kind: "pissa", "pissa_niter_<n>", "olora", "orthogonal" or "loftq".
        site: the linear.
        rank: r.
        scale: s.
        seed: of random numbers.
        original: reads the weight as the checkpoint has it.
        held: reads the weight as the graph holds it; another one where it is quantised.
    """

    kind: str
    site: Site
    rank: int
    scale: float
    seed: int
    original: Read
    held: Read
    made: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, word: str) -> torch.Tensor:
        """`a` or `b`; `a0` and `b0` are a and −b."""
        if word not in self.made:
            a, b = (tensor.float().contiguous() for tensor in self._pair())
            self.made.update({"a": a, "b": b, "a0": a, "b0": b})
        found = self.made.pop(word)
        return -found if word == "b0" else found.clone()

    def _pair(self) -> Pair:
        generator = generator_of(self.seed, f"{self.site.path}.{self.kind}")
        if self.kind == "orthogonal":
            return orthogonal(self.rank, self.site.inp, self.site.out, generator)
        weight = self.site.matrix(self.original().float())
        if self.kind == "olora":
            return leading_of_qr(weight, self.rank)
        if self.kind == "loftq":
            return principal((weight - self.site.matrix(self.held().float())) / self.scale, self.rank)
        rounds = re.fullmatch(r"pissa_niter_(\d+)", self.kind)
        return principal(weight / self.scale, self.rank, int(rounds[1]) if rounds else None, generator)


@dataclass(frozen=True)
class FirstFactor:
    """One tensor of a `FirstPair`."""

    pair: FirstPair
    word: str

    def __call__(self) -> torch.Tensor:
        """Compute it."""
        return self.pair(self.word)


def principal(
    matrix: torch.Tensor, rank: int, rounds: int | None = None, generator: torch.Generator | None = None
) -> Pair:
    """The best approximation b a of a matrix `[out, in]`, with a and b of equal norms (Meng et al. 2024, eq. 2).

    Args:
        matrix: what is approximated.
        rank: r.
        rounds: power iterations of a randomised SVD (Halko et al. 2011, alg. 4.4); None for a full one.
        generator: of the randomised one.
    """
    if rounds is None:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = randomised_svd(matrix, rank, rounds, generator)
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def randomised_svd(
    matrix: torch.Tensor, rank: int, rounds: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values and their vectors by random probes (Halko et al. 2011, alg. 4.4)."""
    probes = min(rank + _SPARE, *matrix.shape)
    basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], probes, generator=generator))[0]
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis)[0])[0]
    u, s, vt = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    return basis @ u, s, vt


_SPARE = 8
"""Dimensions above the rank that a randomised SVD works with."""


def leading_of_qr(matrix: torch.Tensor, rank: int) -> Pair:
    """The first columns of Q as b, and the first rows of R as a (Büyükakyüz 2024, alg. 1)."""
    q, r = torch.linalg.qr(matrix)
    return r[:rank], q[:, :rank]


def orthogonal(rank: int, inp: int, out: int, generator: torch.Generator) -> Pair:
    """a and b that are not zero, and whose product is: their ranks come from the odd and the even rows of one rotation.

    The draw and its tenth are those of PEFT's "orthogonal".
    """
    rows = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    a = (torch.randn(inp, rank // 2, generator=generator) @ rows[0::2]).t() / 10
    b = torch.randn(rank // 2, out, generator=generator).t() @ rows[1::2] / 10
    return a, b
