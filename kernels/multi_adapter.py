"""Many adapters over one batch: every row of x goes through its own adapter, of its own rank.

    y'[i] = s_a ⊙ (y[i] + scale_a · (x[i] A_aᵀ) B_a) + bias_a,      a = the adapter of row i        (S-LoRA, Punica)

Terms. n: rows (tokens) of the batch. A *page* is one rank row: row p of `a_rows` [pages, in] and of `b_rows`
[pages, out] together. An adapter of rank r owns any r pages, listed in `rows[first : first + r]`: they need not be
neighbours, so a pool of pages never fragments, and a rank of 3 or 33 costs 3 or 33 rows. Factors that are vectors take
a page too: the column scale s (DoRA, IA³) and the bias of an adapter are rows of `b_rows`, its input scale u (IA³) is a
row of `a_rows`.

    rows      int32 [m]       the pages of all adapters, one list after another
    adapters  int32 [k, 5]    FIRST, RANK, INPUT, OUTPUT, BIAS: where the list starts, how long it is, and the pages of
                              u, s and bias, −1 for none
    scales    float32 [k]     scale_a
    order     int32 [n]       the rows sorted by adapter; None where they are as they stand
    segments  int32 [t, 3]    START, LENGTH, ADAPTER: `order[start : start + length]` are rows of one adapter, −1 for
                              those of the base alone; at most `TILE` rows each. A length of 0 is padding, so that a
                              recorded launch (CUDA graphs) has a fixed number of segments. `plan` makes both.

Every row is in exactly one segment. y is the base's output without its bias where an adapter may have s or a bias of
its own: s comes before the bias, and bias_a stands in for the base's. The base's bias is then given as `bias`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from surgeon.kernels import jit, shrink_expand

FIRST, RANK, INPUT, OUTPUT, BIAS = range(5)
START, LENGTH, ADAPTER = range(3)
TILE = shrink_expand.ROWS
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def plan(adapter_of_row: Sequence[int], *, pad_to: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`order` and `segments` of a batch.

    Args:
        adapter_of_row: the adapter of each row, −1 for the base alone.
        pad_to: number of segments to pad to with empty ones.
    """
    order = sorted(range(len(adapter_of_row)), key=adapter_of_row.__getitem__)
    segments: list[list[int]] = []
    for position, row in enumerate(order):
        adapter = adapter_of_row[row]
        if segments and segments[-1][ADAPTER] == adapter and segments[-1][LENGTH] < TILE:
            segments[-1][LENGTH] += 1
        else:
            segments.append([position, 1, adapter])
    segments += [[len(order), 0, -1]] * (pad_to - len(segments))
    return torch.tensor(order, dtype=torch.int32), torch.tensor(segments, dtype=torch.int32).reshape(-1, 3)


def reference(
    y: torch.Tensor,
    x: torch.Tensor,
    a_rows: torch.Tensor,
    b_rows: torch.Tensor,
    rows: torch.Tensor,
    adapters: torch.Tensor,
    scales: torch.Tensor,
    order: torch.Tensor | None,
    segments: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation above, adapter by adapter: two small products for each, never a copy of an adapter per row.

    Args:
        y: the base's output `[n, out]`.
        x: the base's input `[n, in]`, u already applied to it (see `scale_inputs`).
        a_rows: `[pages, in]`.
        b_rows: `[pages, out]`.
        rows: see above, as `adapters`, `scales`, `order` and `segments`.
        adapters: see above.
        scales: see above.
        order: see above.
        segments: see above.
        bias: the base's bias `[out]`.

    Returns:
        y' `[n, out]`.
    """
    result = torch.empty_like(y)
    for adapter, chosen in _runs(order, segments):
        part, last = y[chosen], bias
        if adapter >= 0:
            first, rank, _, output, own = adapters[adapter].tolist()
            if rank:
                pages = rows[first : first + rank].tolist()
                a, b = (_gathered(pool, pages).to(x.dtype) for pool in (a_rows, b_rows))
                part = part + ((x[chosen] @ a.T) @ b * scales[adapter]).to(y.dtype)
            if output >= 0:
                part = part * b_rows[output].to(y.dtype)
            last = b_rows[own].to(y.dtype) if own >= 0 else bias
        result[chosen] = part if last is None else part + last
    return result


def reference_scale(
    x: torch.Tensor, a_rows: torch.Tensor, adapters: torch.Tensor, order: torch.Tensor | None, segments: torch.Tensor
) -> torch.Tensor:
    """u_a ⊙ x, for the adapters that have an input scale: what the base and the adapter both read.

    Args:
        x: `[n, in]`.
        a_rows: `[pages, in]`.
        adapters: see above, as `order` and `segments`.
        order: see above.
        segments: see above.
    """
    result = x.clone()
    for adapter, chosen in _runs(order, segments):
        page = int(adapters[adapter, INPUT]) if adapter >= 0 else -1
        if page >= 0:
            result[chosen] = x[chosen] * a_rows[page].to(x.dtype)
    return result


def _runs(order: torch.Tensor | None, segments: torch.Tensor) -> Iterator[tuple[int, torch.Tensor | slice]]:
    """Adapter by adapter, which rows are its own: neighbouring segments of one adapter are one run."""
    found = [segment for segment in segments.tolist() if segment[LENGTH]]
    joined: list[list[int]] = []
    for start, length, adapter in found:
        last = joined[-1] if joined else None
        if last and last[ADAPTER] == adapter and last[START] + last[LENGTH] == start:
            last[LENGTH] += length
        else:
            joined.append([start, length, adapter])
    for start, length, adapter in joined:
        kept = slice(start, start + length)
        yield adapter, kept if order is None else order[kept].long()


def _gathered(pool: torch.Tensor, pages: list[int]) -> torch.Tensor:
    """The pages of an adapter, without a copy where they are neighbours."""
    first = pages[0]
    if pages == list(range(first, first + len(pages))):
        return pool[first : first + len(pages)]
    return pool[pages]


def can_use(x: torch.Tensor, a_rows: torch.Tensor, b_rows: torch.Tensor) -> str:
    """Why the kernels cannot run on these, "" if they can; then the reference runs in their place."""
    if x.dtype not in _DTYPES or a_rows.dtype != x.dtype or b_rows.dtype != x.dtype:
        return f"dtypes {x.dtype}, {a_rows.dtype} and {b_rows.dtype}: one of fp32, fp16 and bf16 for all is needed"
    if not (a_rows.is_contiguous() and b_rows.is_contiguous()):
        return "a pool whose pages are not contiguous"
    return jit.missing()


@torch.library.custom_op("surgeon::multi_adapter", mutates_args=(), device_types="cpu")
def multi_adapter(
    y: torch.Tensor,
    x: torch.Tensor,
    a_rows: torch.Tensor,
    b_rows: torch.Tensor,
    rows: torch.Tensor,
    adapters: torch.Tensor,
    scales: torch.Tensor,
    order: torch.Tensor | None,
    segments: torch.Tensor,
    bias: torch.Tensor | None = None,
    max_rank: int = 0,
) -> torch.Tensor:
    """`reference` on a CPU, two kernels on a GPU; one node of a graph either way.

    Args:
        y: see `reference`, as everything else.
        x: see `reference`.
        a_rows: see `reference`.
        b_rows: see `reference`.
        rows: see `reference`.
        adapters: see `reference`.
        scales: see `reference`.
        order: see `reference`.
        segments: see `reference`.
        bias: see `reference`.
        max_rank: no adapter in `segments` has a higher rank; sizes the buffer between the kernels. Not read on a CPU.
    """
    return reference(y, x, a_rows, b_rows, rows, adapters, scales, order, segments, bias)


@multi_adapter.register_fake
def _(y: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
    return torch.empty_like(y)


@multi_adapter.register_kernel("cuda")
def _(
    y: torch.Tensor,
    x: torch.Tensor,
    a_rows: torch.Tensor,
    b_rows: torch.Tensor,
    rows: torch.Tensor,
    adapters: torch.Tensor,
    scales: torch.Tensor,
    order: torch.Tensor | None,
    segments: torch.Tensor,
    bias: torch.Tensor | None = None,
    max_rank: int = 0,
) -> torch.Tensor:
    given = (a_rows, b_rows, rows, adapters, scales, order, segments, bias)
    if can_use(x, a_rows, b_rows):
        return reference(y, x, *given)
    return shrink_expand.launch(y.contiguous(), x.contiguous(), *given, max_rank)


@torch.library.custom_op("surgeon::scale_inputs", mutates_args=(), device_types="cpu")
def scale_inputs(
    x: torch.Tensor, a_rows: torch.Tensor, adapters: torch.Tensor, order: torch.Tensor | None, segments: torch.Tensor
) -> torch.Tensor:
    """`reference_scale` on a CPU, a kernel on a GPU, with the same arguments."""
    return reference_scale(x, a_rows, adapters, order, segments)


@scale_inputs.register_fake
def _(x: torch.Tensor, *rest: object) -> torch.Tensor:
    return torch.empty_like(x)


@scale_inputs.register_kernel("cuda")
def _(
    x: torch.Tensor, a_rows: torch.Tensor, adapters: torch.Tensor, order: torch.Tensor | None, segments: torch.Tensor
) -> torch.Tensor:
    if can_use(x, a_rows, a_rows):
        return reference_scale(x, a_rows, adapters, order, segments)
    return shrink_expand.launch_scale(x.contiguous(), a_rows, adapters, order, segments)
