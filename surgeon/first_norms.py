"""First values that are norms of a weight's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgeon.sites import Site

Read = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class FirstNorms:
    """‖W + scale · b a‖ `[out]` of the rows of W `[out, in]`.

    Attributes:
        weight: as it is stored.
        site: where it is.
        scale: of the change.
        a: `[r, in]`, as it is first.
        b: `[out, r]`.
    """

    weight: Read
    site: Site
    scale: float
    a: Read
    b: Read

    def __call__(self) -> torch.Tensor:
        """Compute them in fp32."""
        matrix = self.site.matrix(self.weight().float())
        a, b = (self.a(), self.b()) if self.scale else (torch.zeros(1), torch.zeros(1))
        if a.any() and b.any():
            matrix = matrix + (b.float() @ a.float()).mul_(self.scale)
        return row_norms(matrix)


def row_norms(matrix: torch.Tensor) -> torch.Tensor:
    """‖w‖ `[out]` of the rows of `[out, in]`; a row of zeros counts as a tiny one, which can be divided by."""
    return torch.linalg.norm(matrix, dim=1).clamp_min(TINY)


TINY = 1e-15
"""The least norm of a row."""
