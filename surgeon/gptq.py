"""GPTQ: group-wise integers whose errors are made up for by the columns that come after (Frantar et al. 2023).

    min ‖X Wᵀ − X Ŵᵀ‖²,   H = Xᵀ X / tokens + λ I,   H⁻¹ = Uᵀ U with U upper triangular

Columns are quantised from the first to the last (no act-order, so that groups are neighbours). The error of column i,
e = (w_i − ŵ_i) / U_ii, is taken off the columns after it: w_j ← w_j − e U_ij (§3.3, eq. 2 in its Cholesky form). The
scale and the zero point of a group are those of its columns as they are when the first of them is reached.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgeon.errors import UsageError
from surgeon.numerics_int import Groups, check_groups, nearest_codes, range_of
from surgeon.packing import pack

_BLOCK = 128  # columns whose errors are brought to the columns after them together, as in the authors' code


class Hessian:
    """H of a linear's inputs, gathered batch by batch; a constant factor of it changes nothing.

    Args:
        size: inputs of the linear.
    """

    def __init__(self, size: int) -> None:
        self.sum, self.tokens = torch.zeros(size, size), 0

    def add(self, rows: torch.Tensor) -> None:
        """Take inputs `[tokens, in]` in."""
        wide = rows.float()
        self.sum.addmm_(wide.T, wide)
        self.tokens += len(rows)

    def factor(self, damping: float = 0.01) -> torch.Tensor:
        """U `[in, in]`, with λ = `damping` times the mean of H's diagonal; inputs that are always 0 stand alone.

        Raises:
            UsageError: there were no inputs, they are not finite, or H is singular in spite of λ.
        """
        if not self.tokens or not bool(torch.isfinite(self.sum).all()):
            what = "the inputs of the calibration are not finite" if self.tokens else "the calibration has no tokens"
            raise UsageError(what, "", "other samples, or check the checkpoint")
        found = self.sum / self.tokens
        diagonal = found.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal += damping * diagonal.mean()
        try:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(found))
            return torch.linalg.cholesky(inverse, upper=True)
        except RuntimeError as error:
            hint = f"a larger damping (it is {damping}), or more samples"
            raise UsageError("the inputs of the calibration are too much alike to invert", "", hint) from error


def quantise_gptq(
    weight: torch.Tensor,
    factor: torch.Tensor,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = False,
    float_zero: bool = False,
    dtype: torch.dtype | None = None,
) -> Groups:
    """As `surgeon.numerics_int.quantise_groups`, with the codes that GPTQ chooses.

    Args:
        weight: `[out, in]`.
        factor: U `[in, in]`, see `Hessian.factor`.
        bits: see `quantise_groups`, as are the arguments after it.
        group: inputs per group, −1 for a whole row.
        symmetric: the mode.
        float_zero: the mode.
        dtype: of scale and zero; fp32 if None.

    Raises:
        UsageError: see `check_groups`; or a value is not finite.
    """
    size = check_groups(weight.shape[1], group, bits)
    left, lowest = weight.float().clone(), 1 if symmetric else 0
    codes = torch.empty(left.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for start, stop in _blocks(left.shape[1], size):
        block, errors = left[:, start:stop].clone(), torch.empty(len(left), stop - start)
        for column in range(start, stop):
            here = column - start
            if column % size == 0:
                whole = block[:, here : here + size] if size <= stop - start else left[:, column : column + size]
                scale, zero = range_of(whole, bits, symmetric=symmetric, float_zero=float_zero, dtype=dtype)
                scales.append(scale)
                zeros.append(zero)
            chosen = nearest_codes(block[:, here], scale, zero, bits, lowest=lowest)
            codes[:, column] = chosen
            wrong = block[:, here] - (chosen.float() - zero.float()) * scale.float()
            errors[:, here] = wrong / factor[column, column]
            block[:, here + 1 :].addr_(errors[:, here], factor[column, column + 1 : stop], alpha=-1)
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return Groups(pack(codes, bits), torch.stack(scales, 1), torch.stack(zeros, 1), bits)


def _blocks(inputs: int, group: int) -> Iterator[tuple[int, int]]:
    """Consecutive columns: whole groups, or parts of one group that is larger than a block."""
    if group <= _BLOCK:
        step = _BLOCK // group * group
        yield from ((start, min(start + step, inputs)) for start in range(0, inputs, step))
        return
    for first in range(0, inputs, group):
        yield from ((s, min(s + _BLOCK, first + group)) for s in range(first, first + group, _BLOCK))
