"""Many adapters over one batch, beside one grouped product per factor and a loop over adapters."""

from __future__ import annotations

import torch

from benchmarks.gpu.case import Case, Run
from surgeon.kernels import multi_adapter, shrink_expand
from surgeon.serve.packed import WIDTH

# (rows, inputs, outputs, ranks): decode with an adapter for each row, and prefill with four
SHAPES = {True: [(6, 96, 80, [3, 16])], False: [(64, 4096, 4096, [8, 16, 33, 64] * 16), (4096, 4096, 4096, [16] * 4)]}


def looped(y: torch.Tensor, x: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor], of: list[int]) -> Run:
    """PEFT's way: the rows of each adapter in turn."""
    rows = [torch.tensor([i for i, one in enumerate(of) if one == k], device=x.device) for k in range(len(a))]

    def run() -> torch.Tensor:
        found = y.clone()
        for chosen, down, up in zip(rows, a, b, strict=True):
            found[chosen] += (x[chosen] @ down.T) @ up
        return found

    return run


def case(rows: int, inside: int, outside: int, ranks: list[int], device: torch.device, dtype: torch.dtype) -> Case:
    a = [torch.randn(rank, inside, device=device, dtype=dtype) / inside**0.5 for rank in ranks]
    b = [torch.randn(rank, outside, device=device, dtype=dtype) for rank in ranks]
    x, y = (torch.randn(rows, size, device=device, dtype=dtype) for size in (inside, outside))
    of = [row * len(ranks) // rows for row in range(rows)]
    # One pool: all rows of A, then all rows of B, each at a multiple of its width.
    wide_a, total = sum(ranks) * inside, sum(ranks)
    begin = -(-wide_a // outside)
    pool = torch.zeros((begin + total) * outside, device=device, dtype=dtype)
    pool[:wide_a], pool[begin * outside :] = torch.cat(a).flatten(), torch.cat(b).flatten()
    first = [sum(ranks[:k]) for k in range(len(ranks))]
    lines = [[first[k], total + first[k], rank, *[-1] * (WIDTH - 3)] for k, rank in enumerate(ranks)]
    pages, table = torch.cat([torch.arange(total), begin + torch.arange(total)]), torch.tensor(lines)
    given = [pool, *(t.to(device) for t in (pages, table, torch.ones(len(ranks)), multi_adapter.plan(of)))]
    wide = [[t.double() for t in one] for one in (a, b)]
    work = sum(2 * ranks[k] * (inside + outside) for k in of)
    moved = dtype.itemsize * (sum(ranks) * (inside + outside) + rows * (inside + 2 * outside))
    return Case(
        "multi_adapter", f"{rows} rows, {len(ranks)} adapters, {inside} x {outside}",
        lambda: shrink_expand.launch(y, x, None, *given, max(ranks)),
        lambda: looped(y.double(), x.double(), *wide, of)(), 2**-7, {"loop": looped(y, x, a, b, of)}, work, moved,
    )  # fmt: skip


def cases(device: torch.device, *, small: bool) -> list[Case]:
    dtype = torch.float16 if small else torch.bfloat16
    return [case(*shape, device, dtype) for shape in SHAPES[small]]
