"""NF4 to bf16, beside bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.case import Case, Run, bytes_of, installed
from surgeon.kernels import nf4
from surgeon.numerics import BOOKS, FourBit, Nested, dequantise_4bit, quantise_4bit

SHAPES = {True: [(40, 192)], False: [(4096, 4096), (14336, 4096)]}


def on(stored: FourBit, device: torch.device) -> FourBit:
    """A weight moved to a device."""
    nested = stored.nested and Nested(stored.nested.scale.to(device), stored.nested.offset.to(device))
    return FourBit(stored.codes.to(device), stored.absmax.to(device), stored.shape, stored.kind, nested, stored.block)


def quantised_state(stored: FourBit, dtype: torch.dtype) -> Any:
    """bitsandbytes' description of a weight that is not quantised twice; None where it cannot run."""
    if stored.nested is not None or stored.codes.device.type == "cpu" or not installed("bitsandbytes"):
        return None
    from bitsandbytes.functional import QuantState

    book = torch.tensor(BOOKS[stored.kind], device=stored.codes.device)
    return QuantState(stored.absmax, torch.Size(stored.shape), book, stored.block, stored.kind, dtype)


def bitsandbytes(stored: FourBit, dtype: torch.dtype) -> dict[str, Run]:
    """Its function for the same weight."""
    state = quantised_state(stored, dtype)
    if state is None:
        return {}
    from bitsandbytes.functional import dequantize_4bit

    packed = stored.codes[:, None]
    return {"bitsandbytes": lambda: dequantize_4bit(packed, state)}


def cases(device: torch.device, *, small: bool) -> list[Case]:
    found = []
    for out, inp in SHAPES[small]:
        for double in (False, True):
            weight = on(quantise_4bit(torch.randn(out, inp), double=double), device)
            dtype = torch.float16 if small else torch.bfloat16
            found.append(
                Case(
                    "nf4", f"{out} x {inp}{' nested' if double else ''}",
                    lambda weight=weight, dtype=dtype: nf4.launch(weight, dtype),
                    lambda weight=weight: dequantise_4bit(weight, torch.float64),
                    2**-8, bitsandbytes(weight, dtype), 0.0, bytes_of(weight.codes, weight.absmax) + 2.0 * out * inp,
                )
            )  # fmt: skip
    return found
