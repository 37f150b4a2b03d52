"""Paged attention, beside SDPA over keys that already lie end to end."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.gpu.case import Case
from surgeon.kernels import paged_attend
from surgeon.kernels.pages import plan

PAGE = 16
# (requests, new tokens of each, old tokens, query heads, K/V heads, size of a head)
SHAPES = {
    True: [(2, 1, 37, 4, 2, 32)],
    False: [(1, 1, 4095, 32, 8, 128), (64, 1, 2047, 32, 8, 128), (4, 1024, 0, 32, 8, 128)],
}


def case(
    requests: int, new: int, old: int, heads: int, kv: int, size: int, device: torch.device, dtype: torch.dtype
) -> Case:
    total, options = new + old, {"device": device, "dtype": dtype}
    each = -(-total // PAGE)
    blocks = torch.randperm(requests * each).view(requests, each).to(torch.int32)
    k, v = (torch.randn(requests, each * PAGE, kv, size, **options) for _ in range(2))
    pages = [torch.empty(requests * each, PAGE, kv, size, **options) for _ in range(2)]
    for held, whole in zip(pages, (k, v), strict=True):
        held[blocks.flatten().long().to(device)] = whole.view(-1, PAGE, kv, size)
    q = torch.randn(requests * new, heads, size, **options)
    tile = 1 if new == 1 else paged_attend.longest(heads, kv, dtype)
    segments, listed = plan([(new, old)] * requests, tile=tile).to(device), blocks.to(device)
    wide = [x[:, :total].transpose(1, 2) for x in (q.view(requests, new, heads, size), k, v)]
    seen = torch.ones(new, total, device=device, dtype=torch.bool).tril(old)

    def sdpa(*tensors: torch.Tensor) -> torch.Tensor:
        mask = None if old == 0 or new == 1 else seen
        found = F.scaled_dot_product_attention(*tensors, mask, is_causal=old == 0 and new > 1, enable_gqa=True)
        return found.transpose(1, 2).reshape(requests * new, heads, size)

    flops = 4.0 * requests * heads * size * (new * old + new * (new + 1) / 2)
    moved = dtype.itemsize * size * requests * (2 * total * kv + 2 * new * heads)
    return Case(
        "paged_attention", f"{requests} requests, {new} after {old}, {heads}/{kv} x {size}",
        lambda: paged_attend.launch(
            q, *pages, listed, None, segments, None, scale=size**-0.5, window=0, softcap=0.0, windowed=True, tile=tile
        ),
        lambda: sdpa(*(x.double() for x in wide)), 2**-7, {"SDPA, end to end": lambda: sdpa(*wide)}, flops, moved,
    )  # fmt: skip


def cases(device: torch.device, *, small: bool) -> list[Case]:
    dtype = torch.float16 if small else torch.bfloat16
    return [case(*shape, device, dtype) for shape in SHAPES[small]]
