"""Attention over keys and values that lie in pages, for decode and prefill, a batch of requests of any lengths.

    o[i] = softmax over the keys j that row i sees of softcap(scale · q[i] · k[j]), times v[j]

(vLLM: Kwon et al. 2023.) Terms. n: rows (tokens) of the batch, of all requests together. A *page* holds the keys and
values of `page` consecutive tokens of one request; `blocks` lists the pages of each request, so its cache never has to
be moved to grow, and requests that begin alike can share their first pages. Learned prefix columns (prefix tuning) fill
the first pages of a request, which all requests of an adapter share: p columns, the rest of the last prefix page
unused, and token 0 starts a page.

    k_pages   [pages, page, h_kv, d]      v_pages  [pages, page, h_kv, d_v], any numbers between one page and the next
    blocks    int32 [requests, most]      pages of each request in order, its prefix pages first
    prefixes  int32 [requests]            p, the number of its prefix columns; None where nobody has any
    segments  int32 [t, 4]                START, LENGTH, REQUEST, POSITION: rows START … START + LENGTH of q are
                                          consecutive tokens of one request, the first of them its token POSITION; at
                                          most `tile` rows each. A length of 0 is padding. `plan` makes them.

Row i, token `position` of its request, sees the prefix columns and the tokens j ≤ position; with a window only those
with j > position − window. `windowed` says whether the window hides prefix columns too, counted as the p positions
before token 0 (PEFT's prefix tuning), or leaves them to every row. The keys of the rows themselves are in their pages
already (`write_pages`).
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from surgeon import ops
from surgeon.kernels import jit, paged_attend
from surgeon.kernels.pages import LENGTH, POSITION, REQUEST, START, padded, plan, slots, write_pages

__all__ = ["can_use", "paged_attention", "plan", "reference", "slots", "write_pages"]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOGETHER = 1 << 15
"""Numbers in a request's keys up to which a call of its own costs more than copying them beside those of others."""


def reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    blocks: torch.Tensor,
    prefixes: torch.Tensor | None,
    segments: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    windowed: bool = True,
) -> torch.Tensor:
    """The equation above, request by request; short one-row requests of about the same length together.

    Args:
        q: queries `[n, h, d]`.
        k_pages: see above, as `v_pages`, `blocks`, `prefixes` and `segments`.
        v_pages: see above.
        blocks: see above.
        prefixes: see above.
        segments: see above.
        sinks: one extra logit per head `[h]` that takes softmax mass and has no value (gpt-oss).
        scale: factor on the scores.
        window: width of the sliding window, 0 for none.
        softcap: c in c · tanh(scores / c), 0 for none.
        windowed: see above.

    Returns:
        `[n, h, d_v]`; rows in no segment are 0.
    """
    result = q.new_zeros(q.shape[0], q.shape[1], v_pages.shape[-1])
    counts = [0] * len(blocks) if prefixes is None else prefixes.tolist()
    together: dict[tuple[int, int], list[list[int]]] = {}
    for run in _runs(segments):
        prefix = counts[run[REQUEST]]
        few = (prefix + run[POSITION] + 1) * k_pages.shape[2] * k_pages.shape[3] <= TOGETHER
        if few and run[LENGTH] == 1 and sinks is None and not softcap:
            together.setdefault((run[POSITION].bit_length(), prefix), []).append(run)
            continue
        k, v = (_keys(pages, blocks[run[REQUEST]], prefix, run[POSITION] + run[LENGTH]) for pages in (k_pages, v_pages))
        rows = slice(run[START], run[START] + run[LENGTH])
        if run[LENGTH] == 1 and sinks is None and not softcap and not 0 < window <= prefix + run[POSITION]:
            own = q[rows].view(1, k.shape[1], -1, q.shape[2])  # query heads as queries of their key head, read once
            result[rows] = F.scaled_dot_product_attention(own, k, v, scale=scale).reshape(1, q.shape[1], -1)
            continue
        found = ops.attention(
            q[rows].transpose(0, 1)[None], k, v, None, None, sinks,
            scale=scale, causal=True, window=window, softcap=softcap, prefix=0 if windowed else prefix,
        )  # fmt: skip
        result[rows] = found[0].transpose(0, 1)
    for (_, prefix), runs in together.items():
        chosen = torch.tensor([run[START] for run in runs])
        result[chosen] = _one_row_each(q[chosen], k_pages, v_pages, blocks, runs, prefix, scale, window, windowed)
    return result


def _keys(pages: torch.Tensor, blocks: torch.Tensor, prefix: int, tokens: int) -> torch.Tensor:
    """The prefix columns and tokens of one request, `[1, h_kv, prefix + tokens, d]`."""
    page = pages.shape[1]
    start = padded(prefix, page)
    count = -(-(start + tokens) // page)
    listed = blocks[:count].tolist()
    if listed == list(range(listed[0], listed[0] + count)):
        found = pages[listed[0] : listed[0] + count].flatten(0, 1)
    else:
        found = pages.index_select(0, blocks[:count]).flatten(0, 1)
    if start > prefix:
        found = torch.cat([found[:prefix], found[start : start + tokens]])
    return found[: prefix + tokens].transpose(0, 1)[None]


def _one_row_each(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    blocks: torch.Tensor,
    runs: list[list[int]],
    prefix: int,
    scale: float,
    window: int,
    windowed: bool,
) -> torch.Tensor:
    """Decode: requests of about the same length in one call of SDPA, `[b, h, d_v]`; whole pages are gathered."""
    page = k_pages.shape[1]
    start = padded(prefix, page)
    position = torch.tensor([run[POSITION] for run in runs])[:, None]
    count = -(-(start + int(position.max()) + 1) // page)
    chosen = blocks[[run[REQUEST] for run in runs], :count].clamp(min=0)
    slot = torch.arange(count * page)
    token = slot - start
    seen = (token >= 0) & (token <= position)
    if window:
        seen &= token > position - window
    column = slot < prefix
    seen |= (column & (slot - prefix > position - window)) if window and windowed else column
    keys, values = (
        pages.index_select(0, chosen.flatten()).view(len(runs), count * page, *pages.shape[2:])
        for pages in (k_pages, v_pages)
    )
    hidden = ~seen
    keys[hidden], values[hidden] = 0, 0  # what lies in unused slots may be no number, which a mask does not hide
    found = F.scaled_dot_product_attention(
        q[:, :, None], keys.transpose(1, 2), values.transpose(1, 2), seen[:, None, None], scale=scale,
        enable_gqa=q.shape[1] != keys.shape[2],
    )  # fmt: skip
    return found[:, :, 0]


def can_use(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, tile: int) -> str:
    """Why the kernels cannot run on these, "" if they can; then the reference runs in their place."""
    if q.dtype not in _DTYPES or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        return f"dtypes {q.dtype}, {k_pages.dtype} and {v_pages.dtype}: one of fp32, fp16 and bf16 for all is needed"
    if not (k_pages[0].is_contiguous() and v_pages[0].is_contiguous()):
        return "a page that is not contiguous"
    if max(q.shape[-1], v_pages.shape[-1]) > 256:
        return f"heads of {max(q.shape[-1], v_pages.shape[-1])}, above 256"
    most = paged_attend.longest(q.shape[1], k_pages.shape[2], q.dtype)
    if tile > most:
        return f"segments of {tile} rows; {most} fit one tile"
    return jit.missing()


@torch.library.custom_op("surgeon::attend_pages", mutates_args=(), device_types="cpu")
def paged_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    blocks: torch.Tensor,
    prefixes: torch.Tensor | None,
    segments: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    windowed: bool = True,
    tile: int = 1,
) -> torch.Tensor:
    """`reference` on a CPU, a kernel on a GPU; one node of a graph either way.

    Args:
        q: see `reference`, as everything else.
        k_pages: see `reference`.
        v_pages: see `reference`.
        blocks: see `reference`.
        prefixes: see `reference`.
        segments: see `reference`.
        sinks: see `reference`.
        scale: see `reference`.
        window: see `reference`.
        softcap: see `reference`.
        windowed: see `reference`.
        tile: no segment is longer; sizes the kernel's tiles. Not read on a CPU.
    """
    return reference(
        q, k_pages, v_pages, blocks, prefixes, segments, sinks,
        scale=scale, window=window, softcap=softcap, windowed=windowed,
    )  # fmt: skip


@paged_attention.register_kernel("cuda")
def _(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    blocks: torch.Tensor,
    prefixes: torch.Tensor | None,
    segments: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    windowed: bool = True,
    tile: int = 1,
) -> torch.Tensor:
    function = reference if can_use(q, k_pages, v_pages, tile) else functools.partial(paged_attend.launch, tile=tile)
    return function(
        q.contiguous(), k_pages, v_pages, blocks, prefixes, segments, sinks,
        scale=scale, window=window, softcap=softcap, windowed=windowed,
    )  # fmt: skip


@paged_attention.register_fake
def _(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_pages.shape[-1])


def _runs(segments: torch.Tensor) -> list[list[int]]:
    """Segments without the empty ones, those of a request that follow one another joined."""
    joined: list[list[int]] = []
    for start, length, request, position in segments.tolist():
        last = joined[-1] if joined else None
        if last and last[REQUEST] == request and last[START] + last[LENGTH] == start and length:
            last[LENGTH] += length
        elif length:
            joined.append([start, length, request, position])
    return joined
