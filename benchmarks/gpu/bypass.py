"""Low-rank bypasses of q, k and v, and VeRA's, beside products of torch; forward and the gradients of the inputs."""

from __future__ import annotations

import torch

from benchmarks.gpu.case import Case
from surgeon.kernels import bypass

# (rows, inputs, outputs of the parts, rank, whether it is VeRA)
SHAPES = {
    True: [(5, 96, (64, 32, 32), 3, False), (5, 96, (64,), 32, True)],
    False: [
        (1, 4096, (4096, 1024, 1024), 16, False), (16, 4096, (4096, 1024, 1024), 16, False),
        (8192, 4096, (4096, 1024, 1024), 16, False), (8192, 4096, (4096,), 256, True),
    ],
}  # fmt: skip


def pair(
    rows: int, inside: int, outside: tuple[int, ...], rank: int, vera: bool, device: torch.device, dtype: torch.dtype
) -> list[Case]:
    options = {"device": device, "dtype": dtype}
    x, ys = torch.randn(rows, inside, **options), [torch.randn(rows, out, **options) for out in outside]
    a = torch.randn(rank * len(outside), inside, **options) / inside**0.5
    bs = [torch.randn(out, rank, **options) / rank**0.5 for out in outside]
    d, gain = (torch.rand(n, **options) if vera else None for n in (rank, outside[0]))
    scales = [0.5] * len(outside)
    wide = [None if t is None else t.double() for t in (x, a, d, gain)]
    wider = [[t.double() for t in one] for one in (ys, bs)]
    flops = 2.0 * rows * rank * (len(outside) * inside + sum(outside))
    moved = dtype.itemsize * (rows * (inside + 2 * sum(outside)) + a.numel() + sum(b.numel() for b in bs))
    name = f"{'VeRA' if vera else 'LoRA'} {rows} x {inside} -> {'+'.join(map(str, outside))}, rank {rank}"

    def gradients(kernels: bool, grads: list, *t: torch.Tensor | None) -> list[torch.Tensor]:
        inputs = bypass._by_kernels if kernels else bypass._by_torch
        return list(inputs(grads, t[1], t[4], scales, t[2], t[3]))  # type: ignore[arg-type]

    return [
        Case(
            "bypass", name, lambda: bypass.launch(ys, x, a, bs, scales, d, gain)[:-1],
            lambda: bypass.reference(wider[0], wide[0], wide[1], wider[1], scales, wide[2], wide[3])[:-1], 2**-6,
            {"torch": lambda: bypass.reference(ys, x, a, bs, scales, d, gain)[:-1]}, flops, moved,
        ),
        Case(
            "bypass backward", name, lambda: gradients(True, ys, x, a, d, gain, bs),
            lambda: gradients(False, wider[0], *wide, wider[1]), 2**-6,
            {"torch": lambda: gradients(False, ys, x, a, d, gain, bs)}, flops, moved,
        ),
    ]  # fmt: skip


def cases(device: torch.device, *, small: bool) -> list[Case]:
    dtype = torch.float16 if small else torch.bfloat16
    return [case for shape in SHAPES[small] for case in pair(*shape, device, dtype)]
