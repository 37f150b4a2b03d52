"""Arithmetic on weight changes ΔW = B A, kept in their factors wherever that is possible.

Matrices may have axes in front, one matrix per expert: they share one rank, and errors are those of all together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """ΔW `[out, in]` = b a, in fp32.

    Attributes:
        a: `[r, in]`.
        b: `[out, r]`.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2]

    def matrix(self) -> Tensor:
        """ΔW."""
        return self.b @ self.a

    def scaled(self, weight: float) -> LowRank:
        """weight · ΔW."""
        return LowRank(self.a, self.b * weight)


def added(parts: list[LowRank]) -> LowRank:
    """The sum, exactly: factors side by side, ranks added."""
    return LowRank(torch.cat([part.a for part in parts], -2), torch.cat([part.b for part in parts], -1))


def factored(matrix: Tensor) -> LowRank:
    """A matrix `[out, in]` as balanced factors U √S and √S Vᵀ of full rank, largest singular values first."""
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s.sqrt()
    return LowRank((root[..., None] * vt).float(), (u * root[..., None, :]).float())


def sorted_factors(change: LowRank) -> tuple[LowRank, Tensor]:
    """The same ΔW with balanced orthogonal factors, and its singular values `[r]`, largest first.

    From the QR decompositions of b and aᵀ and the SVD of an r × r matrix: the matrix itself is never made.
    """
    qb, rb = torch.linalg.qr(change.b.double())
    qa, ra = torch.linalg.qr(change.a.double().mT)
    u, s, vt = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    root = s.sqrt()
    return LowRank(((root[..., None] * vt) @ qa.mT).float(), ((qb @ u) * root[..., None, :]).float()), s


def truncated(change: LowRank, rank: int = 0, error: float = 0.0) -> tuple[LowRank, float]:
    """The best approximation of a lower rank (Eckart–Young), and its relative error ‖ΔW − ΔW'‖ / ‖ΔW‖.

    Args:
        change: ΔW.
        rank: at most this rank; 0: any.
        error: the lowest rank whose relative error is at most this, within `rank`.
    """
    rank = rank or min(change.a.shape[-1], change.b.shape[-2])
    if change.rank <= rank and not error:
        return change, 0.0
    factors, values = sorted_factors(change)
    s = values.flatten(0, -2).square().sum(0).sqrt() if values.dim() > 1 else values
    # tail[k] is what is lost when the first k singular values are kept.
    tail = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]).sqrt()
    whole = float(tail[0])
    keep = int((tail > error * whole).sum()) if error else len(s)
    keep = max(1, min(keep, rank))
    lost = float(tail[keep]) / whole if whole else 0.0
    return LowRank(factors.a[..., :keep, :], factors.b[..., :keep]), lost


def ties(changes: list[Tensor], weights: list[float], density: float) -> Tensor:
    """TIES merging of weight changes `[out, in]` (Yadav et al. 2023, alg. 1): trim, elect a sign, mean of who agrees.

    Of every change the share `density` with the largest magnitude stays. The sign of an entry is that of the weighted
    sum; the result is the mean over the changes that have an entry of this sign there.
    """
    kept = torch.stack([weight * _largest(change, density) for change, weight in zip(changes, weights, strict=True)])
    sign = torch.sign(kept.sum(0))
    agrees = (torch.sign(kept) == sign) & (kept != 0)
    return (kept * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _largest(matrix: Tensor, density: float) -> Tensor:
    count = max(1, round(density * matrix.numel()))
    chosen = torch.zeros(matrix.numel(), dtype=torch.bool)
    chosen[matrix.abs().flatten().topk(count).indices] = True
    return matrix * chosen.view_as(matrix)


def dare(changes: list[Tensor], weights: list[float], density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2024): Σ wᵢ · mᵢ ⊙ ΔWᵢ / density with mᵢ ~ Bernoulli(density), the same in expectation."""
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        mask = torch.rand(change.shape, generator=generator) < density
        total += weight / density * change * mask
    return total
