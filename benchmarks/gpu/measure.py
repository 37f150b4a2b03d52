"""Times on a GPU: cold caches, no launch overhead, and what the device itself reaches."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

CALLS = 20
REPLAYS = 7
_FLUSH = 1 << 28  # bytes, several times the L2 of any GPU


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a call that finds its data in memory, not in the L2.

    Two graphs are replayed: `CALLS` × (flush, run) and `CALLS` × flush. Their difference holds no launch by the CPU,
    which takes longer than the fastest kernels run. What cannot be captured is timed by events, launches and all.
    """
    flush = torch.empty(_FLUSH // 4, dtype=torch.int32, device="cuda")
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    try:
        both, alone = _graph(lambda: (flush.zero_(), run())), _graph(flush.zero_)
    except RuntimeError:
        torch.cuda.synchronize()
        return _by_events(run, flush)
    differences = [_timed(both.replay) - _timed(alone.replay) for _ in range(REPLAYS)]
    return max(statistics.median(differences), 0.0) / CALLS


def _graph(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            step()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _timed(action: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _by_events(run: Callable[[], Any], flush: torch.Tensor) -> float:
    times = []
    for _ in range(REPLAYS):
        flush.zero_()
        times.append(_timed(run))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """What this device reaches: bytes per second of a copy of 1 GiB, FLOP/s of a bf16 product of random numbers."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copied = milliseconds(lambda: target.copy_(source))
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    multiplied = milliseconds(lambda: a @ b)
    return {"bytes_per_s": 2 * source.nbytes / copied * 1e3, "flop_per_s": 2 * 8192**3 / multiplied * 1e3}


def bound(flops: float, moved: float, reached: dict[str, float]) -> float:
    """The roofline: milliseconds that the work takes at least at the rates that the device reaches."""
    return 1e3 * max(flops / reached["flop_per_s"], moved / reached["bytes_per_s"])
