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
Rounded = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class FirstPair:
    """a and b of one site, computed together when one of them is asked for, and forgotten when both have been.

    Attributes:
        kind: "pissa", "pissa_niter_<n>", "olora", "orthogonal", "loftq" or "loftq_iter_<n>".
        site: the linear.
        rank: r.
        scale: s.
        seed: of random numbers.
        original: reads the weight as the checkpoint has it.
        rounded: a matrix `[out, in]` as its codes, where the weight is quantised, have it.
    """

    kind: str
    site: Site
    rank: int
    scale: float
    seed: int
    original: Read
    rounded: Rounded | None = None
    made: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __call__(self, word: str) -> torch.Tensor:
        """`a` or `b`; of what moves the base `a0`, `b0` are a and −b; of LoftQ, without s, those of the codes."""
        if word not in self.made:
            made = {word: tensor.float().contiguous() for word, tensor in self._made().items()}
            self.made.update(made)
        return self.made.pop(word).clone()

    def _made(self) -> dict[str, torch.Tensor]:
        weight = self.site.matrix(self.original().float())
        if self.kind.startswith("loftq"):
            assert self.rounded is not None
            (a0, b0), (a, b) = loftq(weight, self.rank, rounds_of(self.kind), self.rounded)
            root = abs(self.scale) ** 0.5
            return {"a": a / root, "b": b * (root / self.scale), "a0": a0, "b0": b0}
        a, b = self._pair(weight)
        return {"a": a, "b": b, "a0": a, "b0": -b}

    def _pair(self, weight: torch.Tensor) -> Pair:
        generator = generator_of(self.seed, f"{self.site.path}.{self.kind}")
        if self.kind == "orthogonal":
            return orthogonal(self.rank, self.site.inp, self.site.out, generator)
        if self.kind == "olora":
            return leading_of_qr(weight, self.rank)
        rounds = re.fullmatch(r"pissa_niter_(\d+)", self.kind)
        return principal(weight / self.scale, self.rank, int(rounds[1]) if rounds else None, generator)


def rounds_of(kind: str) -> int:
    """n of "loftq_iter_<n>"; 1 of "loftq"."""
    found = re.fullmatch(r"loftq_iter_(\d+)", kind)
    return int(found[1]) if found else 1


def loftq(weight: torch.Tensor, rank: int, rounds: int, rounded: Rounded) -> tuple[Pair, Pair]:
    """Q = quantised(W − b a) and b a ≈ W − Q, in turns from b a = 0 (Li et al. 2023, alg. 1).

    Args:
        weight: W `[out, in]`.
        rank: r.
        rounds: how often.
        rounded: what quantising and dequantising makes of a matrix.

    Returns:
        The pair that the last Q was made with, and the one that was made from it.
    """
    before, pair = _nothing(weight, rank), _nothing(weight, rank)
    for _ in range(rounds):
        before = pair
        pair = principal(weight - rounded(weight - pair[1] @ pair[0]).float(), rank)
    return before, pair


def _nothing(weight: torch.Tensor, rank: int) -> Pair:
    return weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)


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
