"""Paged attention: against plain attention over each request's keys laid end to end, NaN in every unused slot."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

import pytest
import torch

from surgeon import ops
from surgeon.kernels import paged_attend
from surgeon.kernels import paged_attention as pa

PAGE, HEADS, KV_HEADS, SIZE = 4, 6, 2, 16


@dataclass
class Batch:
    """A batch in pages, and each request's rows, keys and values end to end."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    blocks: torch.Tensor
    prefixes: torch.Tensor
    requests: list[tuple[int, int]]
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    def expected(self, *, window: int = 0, windowed: bool = True, **options: object) -> torch.Tensor:
        found, start = [], 0
        for request, (rows, _) in enumerate(self.requests):
            prefix = 0 if windowed else int(self.prefixes[request])
            k, v = (x[request].transpose(0, 1)[None].double() for x in (self.k, self.v))
            q = self.q[start : start + rows].transpose(0, 1)[None].double()
            o = ops.attention(q, k, v, scale=SIZE**-0.5, causal=True, window=window, prefix=prefix, **options)
            found.append(o[0].transpose(0, 1))
            start += rows
        return torch.cat(found)


def make_batch(requests: list[tuple[int, int]], prefixes: list[int], *, kv_heads: int = KV_HEADS) -> Batch:
    """Requests as (rows, position of the first); equal prefix lengths share their pages."""
    need = [
        (-(-p // PAGE), -(-(rows + position) // PAGE)) for (rows, position), p in zip(requests, prefixes, strict=True)
    ]
    free = list(range(sum(a + b for a, b in need) + 3))
    random.shuffle(free)
    k_pages, v_pages = (torch.full((len(free), PAGE, kv_heads, SIZE), torch.nan) for _ in range(2))
    shared: dict[int, tuple[list[int], torch.Tensor, torch.Tensor]] = {}
    blocks = torch.full((len(requests), max(a + b for a, b in need)), -1, dtype=torch.int32)
    keys, values = [], []
    for request, ((rows, position), prefix) in enumerate(zip(requests, prefixes, strict=True)):
        first, more = need[request]
        if prefix not in shared:
            pages = [free.pop() for _ in range(first)]
            shared[prefix] = (pages, *(torch.randn(prefix, kv_heads, SIZE) for _ in range(2)))
            at = [pages[i // PAGE] * PAGE + i % PAGE for i in range(prefix)]
            k_pages.view(-1, kv_heads, SIZE)[at], v_pages.view(-1, kv_heads, SIZE)[at] = shared[prefix][1:]
        listed = shared[prefix][0] + [free.pop() for _ in range(more)]
        blocks[request, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
        k, v = (torch.randn(rows + position, kv_heads, SIZE) for _ in range(2))
        where = pa.slots(blocks, request, torch.arange(rows + position), PAGE, prefix)
        pa.write_pages(k, v, k_pages, v_pages, where)
        keys.append(torch.cat([shared[prefix][1], k]))
        values.append(torch.cat([shared[prefix][2], v]))
    q = torch.randn(sum(rows for rows, _ in requests), HEADS, SIZE)
    return Batch(q, k_pages, v_pages, blocks, torch.tensor(prefixes, dtype=torch.int32), requests, keys, values)


BATCHES = {
    "prefill": ([(5, 0), (13, 0), (1, 0)], [0, 0, 0]),
    "decode": ([(1, 4), (1, 5), (1, 17), (1, 6), (1, 0)], [0, 0, 0, 0, 0]),
    "prefixes": ([(1, 6), (7, 0), (1, 7), (3, 8), (1, 7)], [3, 5, 3, 4, 0]),
    "later part of a prompt": ([(6, 9), (1, 30)], [0, 0]),
}
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "window": {"window": 3},
    "window beside the prefix": {"window": 3, "windowed": False},
    "softcap": {"softcap": 2.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("requests", "prefixes"), BATCHES.values(), ids=BATCHES)
def test_reference_is_attention(requests, prefixes, options) -> None:
    batch = make_batch(requests, prefixes)
    segments = pa.plan(requests, tile=4, pad_to=12)
    given = (batch.q, batch.k_pages, batch.v_pages, batch.blocks, batch.prefixes, segments)
    found = pa.paged_attention(*given, scale=SIZE**-0.5, tile=4, **options)
    torch.testing.assert_close(found.double(), batch.expected(**options), atol=1e-5, rtol=1e-4)


def attended(batch: Batch, tile: int = 4, sinks: torch.Tensor | None = None, **options: object) -> torch.Tensor:
    """By the kernels."""
    prefixes = batch.prefixes if batch.prefixes.any() else None
    segments = pa.plan(batch.requests, tile=tile, pad_to=len(batch.requests) + 2)
    given = (batch.q, batch.k_pages, batch.v_pages, batch.blocks, prefixes, segments, sinks)
    rest = {"scale": SIZE**-0.5, "window": 0, "softcap": 0.0, "windowed": True, "tile": tile}
    return paged_attend.launch(*given, **{**rest, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("requests", "prefixes"), BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("splits", [1, 3])
def test_kernels_are_attention(requests, prefixes, options, splits, monkeypatch) -> None:
    monkeypatch.setattr(paged_attend, "FULL", 10**6 if splits > 1 else 0)
    monkeypatch.setattr(paged_attend, "SPLITS", splits)
    monkeypatch.setattr(paged_attend, "KEYS", 16)
    batch = make_batch(requests, prefixes)
    found = attended(batch, **options)
    torch.testing.assert_close(found.double(), batch.expected(**options), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_in_half_precision(dtype: torch.dtype) -> None:
    batch = make_batch([(1, 6), (9, 2), (1, 0)], [3, 0, 0])
    halves = {name: getattr(batch, name).to(dtype) for name in ("q", "k_pages", "v_pages")}
    exact = dataclasses.replace(
        batch, q=halves["q"], k=[k.to(dtype) for k in batch.k], v=[v.to(dtype) for v in batch.v]
    )
    found = attended(dataclasses.replace(exact, **halves))
    torch.testing.assert_close(found.double(), exact.expected(), atol=2e-2 if dtype == torch.bfloat16 else 3e-3, rtol=0)


@pytest.mark.parametrize("splits", [1, 3])
def test_sinks_take_mass(splits: int, monkeypatch) -> None:
    monkeypatch.setattr(paged_attend, "FULL", 10**6 if splits > 1 else 0)
    monkeypatch.setattr(paged_attend, "SPLITS", splits)
    batch, sinks = make_batch([(1, 6), (4, 2)], [3, 0]), torch.randn(HEADS)
    given = (batch.q, batch.k_pages, batch.v_pages, batch.blocks, batch.prefixes, pa.plan(batch.requests))
    for found in (pa.paged_attention(*given, sinks, scale=SIZE**-0.5), attended(batch, sinks=sinks)):
        torch.testing.assert_close(found.double(), batch.expected(sinks=sinks), atol=1e-5, rtol=1e-4)


def test_plan_chops_and_pads() -> None:
    found = pa.plan([(5, 0), (1, 7)], tile=4, pad_to=5)
    assert found.tolist() == [[0, 4, 0, 0], [4, 1, 0, 4], [5, 1, 1, 7], [6, 0, 0, 0], [6, 0, 0, 0]]


def test_rows_of_no_segment_are_zero() -> None:
    batch = make_batch([(1, 6), (2, 0)], [0, 0])
    given = (batch.q, batch.k_pages, batch.v_pages, batch.blocks, None, pa.plan(batch.requests[:1]))
    assert torch.equal(pa.paged_attention(*given, scale=1.0)[1:], torch.zeros(2, HEADS, SIZE))


def test_one_node_of_an_exported_graph() -> None:
    batch = make_batch([(2, 3)], [0])
    segments = pa.plan(batch.requests)

    class Module(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.ops.surgeon.attend_pages(q, k, v, batch.blocks, None, segments, scale=1.0)

    given = (batch.q, batch.k_pages, batch.v_pages)
    program = torch.export.export(Module(), given).run_decompositions({})
    assert "surgeon.attend_pages" in str(program.graph)
    assert torch.equal(program.module()(*given), Module()(*given))
