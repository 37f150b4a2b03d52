"""Many adapters over one batch: every row of x goes through its own adapter, of its own rank, out of one pool.

    y'[i] = s ⊙ (y[i] + o ⊙ (scale · ((x[i] Aᵀ) ⊙ l) B)) + bias_a,      of row i's adapter         (S-LoRA, Punica)

The server's operators `surgeon::pooled_bypass` and `surgeon::pooled_input` run these kernels on a GPU
(`surgeon.on_gpu`). What they read is the server's own:

    pool      [numbers]       everything; a row of width w lies at a multiple of w, and its number is that multiple
    rows      int64 [m]       numbers of the rows of all adapters of the batch
    table     int64 [k, …]    a line per adapter, `surgeon.serve.packed`: FIRST_A and FIRST_B are places in `rows` where
                              its RANK rows of A `[r, in]` and of B `[r, out]` begin, LOW, OUT, INPUT, OUTPUT and BIAS
                              those of l `[r]`, o `[out]`, u `[in]`, s `[out]` and bias_a `[out]`, −1 for none
    scales    float32 [k]
    segments  int32 [t, 3]    START, LENGTH, ADAPTER: neighbouring rows of x with one adapter, −1 for the base alone, at
                              most `TILE` of them. A length of 0 is padding, so that a recorded launch (CUDA graphs) has
                              a fixed number of segments. `plan` makes them.

An adapter's rows need not be neighbours, so a pool never fragments, and a rank of 3 or 33 costs 3 or 33 rows. Every row
of x is in exactly one segment. y has the base's bias in it already; it is taken off first and put back last where an
adapter has s, and left off where it has a bias of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from surgeon.kernels import jit, shrink_expand
from surgeon.serve.packed import BIAS, FIRST_A, FIRST_B, INPUT, LOW, OUT, OUTPUT, RANK

START, LENGTH, ADAPTER = range(3)
TILE = shrink_expand.ROWS
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def plan(owners: Sequence[int], *, pad_to: int = 0) -> torch.Tensor:
    """The segments of a batch.

    Args:
        owners: the adapter of each row, −1 for the base alone.
        pad_to: number of segments to pad to with empty ones.
    """
    segments: list[list[int]] = []
    for position, adapter in enumerate(owners):
        if segments and segments[-1][ADAPTER] == adapter and segments[-1][LENGTH] < TILE:
            segments[-1][LENGTH] += 1
        else:
            segments.append([position, 1, adapter])
    segments += [[len(owners), 0, -1]] * (pad_to - len(segments))
    return torch.tensor(segments, dtype=torch.int32).reshape(-1, 3)


def reference(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    pool: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    segments: torch.Tensor,
) -> torch.Tensor:
    """The equation above, segment by segment.

    Args:
        y: the base's output `[n, out]`.
        x: the base's input `[n, in]`, u already applied to it (see `reference_scale`).
        bias: the base's bias `[out]`, None where it has none.
        pool: see above.
        rows: see above, as `table`, `scales` and `segments`.
        table: see above.
        scales: see above.
        segments: see above.

    Returns:
        y' `[n, out]`.
    """
    result, base = y.clone(), torch.zeros_like(y[0]) if bias is None else bias
    for chosen, line, scale in _lines(table, scales, segments):
        added = _added(x[chosen], y.shape[1], pool, rows, line) * scale
        out, output, own = (
            None if line[name] < 0 else _rows(pool, rows, line[name], 1, y.shape[1])[0].to(y.dtype)
            for name in (OUT, OUTPUT, BIAS)
        )
        added = added.to(y.dtype) if out is None else added.to(y.dtype) * out
        if output is None and own is None:
            result[chosen] += added
        else:
            part = y[chosen] - base + added
            result[chosen] = (part if output is None else part * output) + (base if own is None else own)
    return result


def _added(x: torch.Tensor, out: int, pool: torch.Tensor, rows: torch.Tensor, line: list[int]) -> torch.Tensor:
    """((x Aᵀ) ⊙ l) B of one adapter."""
    rank = line[RANK]
    if not rank:
        return x.new_zeros(len(x), out)
    low = x @ _rows(pool, rows, line[FIRST_A], rank, x.shape[1]).to(x.dtype).T
    if line[LOW] >= 0:
        low = low * _rows(pool, rows, line[LOW], 1, rank).to(x.dtype)
    return low @ _rows(pool, rows, line[FIRST_B], rank, out).to(x.dtype)


def reference_scale(
    x: torch.Tensor, pool: torch.Tensor, rows: torch.Tensor, table: torch.Tensor, segments: torch.Tensor
) -> torch.Tensor:
    """u ⊙ x, for the adapters that have an input scale: what the base and the adapter both read.

    Args:
        x: `[n, in]`.
        pool: see above, as `rows`, `table` and `segments`.
        rows: see above.
        table: see above.
        segments: see above.
    """
    result = x.clone()
    for chosen, line, _ in _lines(table, torch.ones(len(table)), segments):
        if line[INPUT] >= 0:
            result[chosen] *= _rows(pool, rows, line[INPUT], 1, x.shape[1]).to(x.dtype)
    return result


def _lines(
    table: torch.Tensor, scales: torch.Tensor, segments: torch.Tensor
) -> Iterator[tuple[slice, list[int], float]]:
    """Rows of x, and what their adapter's line says."""
    for start, length, adapter in segments.tolist():
        if length and adapter >= 0:
            yield slice(start, start + length), table[adapter].tolist(), float(scales[adapter])


def _rows(pool: torch.Tensor, rows: torch.Tensor, first: int, count: int, width: int) -> torch.Tensor:
    """`[count, width]`."""
    whole = pool[: pool.numel() // width * width].view(-1, width)
    return whole[rows[first : first + count]]


def can_use(y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor) -> str:
    """Why the kernels cannot run on these, "" if they can; then plain torch runs in their place."""
    if x.dtype not in _DTYPES or y.dtype != x.dtype or pool.dtype != x.dtype:
        return f"dtypes {y.dtype}, {x.dtype} and {pool.dtype}: one of fp32, fp16 and bf16 for all is needed"
    return jit.missing()
