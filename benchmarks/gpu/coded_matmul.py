"""Products of a few tokens with weights in NF4 and in integers, beside bitsandbytes and a dense bf16 product.

The dense product is there for its time: its error is that of the quantisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu.case import Case, Run, bytes_of
from benchmarks.gpu.nf4 import on, quantised_state
from surgeon.kernels import int_matmul, nf4_matmul
from surgeon.numerics import FourBit, quantise_4bit
from surgeon.numerics_int import Groups, quantise_groups

SHAPES = {True: [(40, 192)], False: [(4096, 4096), (14336, 4096), (4096, 14336)]}
ROWS = {True: [3], False: [1, 16]}
RANK = 16


def cases(device: torch.device, *, small: bool) -> list[Case]:
    dtype = torch.float32 if small else torch.bfloat16
    found = []
    for out, inp in SHAPES[small]:
        dense = torch.randn(out, inp)
        weights: dict[str, FourBit | Groups] = {"nf4": on(quantise_4bit(dense), device)}
        for bits in (3, 4):
            groups = quantise_groups(dense, bits, 32, float_zero=True, dtype=dtype)
            weights[f"int{bits}"] = Groups(
                groups.codes.to(device), groups.scale.to(device), groups.zero.to(device), bits
            )
        for rows in ROWS[small]:
            x = torch.randn(rows, inp, device=device, dtype=dtype)
            for name, weight in weights.items():
                found += [made(name, weight, x, dense.to(device, dtype), rank) for rank in (0, RANK)]
    return found


def made(name: str, weight: FourBit | Groups, x: torch.Tensor, dense: torch.Tensor, rank: int) -> Case:
    (rows, inp), out = x.shape, dense.shape[0]
    kernel: Any = nf4_matmul if isinstance(weight, FourBit) else int_matmul
    low, up = (torch.randn(n, rank, device=x.device, dtype=x.dtype) for n in (rows, out)) if rank else (None, None)
    wide = [None if term is None else term.double() for term in (low, up)]
    libraries: dict[str, Run] = {f"{x.dtype} product".removeprefix("torch."): lambda: F.linear(x, dense)}
    libraries = {} if x.device.type == "cpu" else libraries | four_bit(weight, x)
    codes = (weight.codes, weight.absmax) if isinstance(weight, FourBit) else (weight.codes, weight.scale, weight.zero)
    return Case(
        "coded_matmul", f"{name} {rows} x {inp} x {out}{f' rank {rank}' if rank else ''}",
        lambda: kernel.launch(x, weight, None, low, up),
        lambda: kernel.reference(x.double(), weight, None, *wide),
        1e-5 if x.dtype == torch.float32 else 2e-2,
        {} if rank else libraries,
        2.0 * rows * inp * out, bytes_of(*codes, x, low, up) + float(x.itemsize * rows * out),
    )  # fmt: skip


def four_bit(weight: FourBit | Groups, x: torch.Tensor) -> dict[str, Run]:
    """bitsandbytes' product, for the weight it can hold."""
    state = quantised_state(weight, x.dtype) if isinstance(weight, FourBit) else None
    if state is None:
        return {}
    from bitsandbytes import matmul_4bit

    packed = weight.codes[:, None]
    return {"bitsandbytes": lambda: matmul_4bit(x, packed.t(), quant_state=state)}
