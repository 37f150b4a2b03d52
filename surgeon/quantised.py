"""Linears whose weight is held in codes: the operators, and what a graph remembers of the weight they stand for.

    y = x Wᵀ + bias,   W = dequantised(codes, …)

The operators are CompositeImplicitAutograd: they stay one node through `torch.export`, train, and work under autocast.
The weight is dequantised in the forward pass and again in the backward pass; nothing of it is kept in between, and x is
not kept at all, since the codes do not train.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from surgeon import on_gpu, packed
from surgeon.decode import decode_4bit, decode_groups, is_traced
from surgeon.numerics import FourBit, Nested
from surgeon.numerics_int import Groups

_LIBRARY = torch.library.Library("surgeon", "FRAGMENT")
_NF4 = "Tensor codes, Tensor absmax, Tensor? scale=None, Tensor? offset=None"
_INT = "Tensor codes, Tensor scale, Tensor zero"
_LIBRARY.define(f"nf4_weight({_NF4}, *, int out, int inp, str kind='nf4') -> Tensor")
_LIBRARY.define(f"nf4_linear(Tensor x, Tensor? bias, {_NF4}, *, int out, int inp, str kind='nf4') -> Tensor")
_LIBRARY.define(f"int_weight({_INT}, *, int bits) -> Tensor")
_LIBRARY.define(f"int_linear(Tensor x, Tensor? bias, {_INT}, *, int bits) -> Tensor")

Maker = functools.partial[Tensor]
"""Called with a dtype it makes a weight; its one argument is the weight in codes."""
HELD = "held"  # node.meta key of a linear whose weight is held in codes


@dataclass(frozen=True)
class Held:
    """The weight that a quantised linear stands for.

    Attributes:
        owner: id of the pass that quantised it.
        function: the operator the node was (aten.linear or aten.addmm).
        target: name of the weight, relative to its layer.
        meta: its metadata as a node, its shape among it.
    """

    owner: str
    function: Any
    target: str
    meta: dict[str, Any] = field(hash=False, compare=False)


def nf4_weight(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    out: int,
    inp: int,
    kind: str = "nf4",
) -> Tensor:
    """The weight `[out, inp]` in fp32, see `surgeon.numerics`; `scale` and `offset` are of the double quantisation."""
    return nf4_maker(codes, absmax, scale, offset, out=out, inp=inp, kind=kind)(torch.float32)


def nf4_linear(
    x: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    out: int,
    inp: int,
    kind: str = "nf4",
) -> Tensor:
    """x Wᵀ + bias with W `[out, inp]` in NF4 or FP4, rounded to the dtype of the product."""
    return _multiplied(x, bias, nf4_maker(codes, absmax, scale, offset, out=out, inp=inp, kind=kind))


def int_weight(codes: Tensor, scale: Tensor, zero: Tensor, *, bits: int) -> Tensor:
    """scale · (code − zero) `[out, in]`, in fp32 (fp64 for a scale in fp64), see `surgeon.numerics_int`."""
    return decode_groups(Groups(codes, scale, zero, bits), torch.promote_types(scale.dtype, torch.float32))


def int_linear(x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor, zero: Tensor, *, bits: int) -> Tensor:
    """x Wᵀ + bias with W in group-wise integers, rounded to the dtype of the product."""
    return _multiplied(x, bias, int_maker(codes, scale, zero, bits=bits))


def nf4_maker(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    out: int,
    inp: int,
    kind: str = "nf4",
) -> Maker:
    """What makes the weight of `nf4_linear` in a dtype, whenever it is called."""
    nested = None if scale is None or offset is None else Nested(scale, offset)
    stored = FourBit(codes, absmax, (out, inp), kind, nested)
    return functools.partial(decode_4bit, stored)


def int_maker(codes: Tensor, scale: Tensor, zero: Tensor, *, bits: int) -> Maker:
    """What makes the weight of `int_linear` in a dtype, whenever it is called."""
    return functools.partial(decode_groups, Groups(codes, scale, zero, bits))


def _multiplied(x: Tensor, bias: Tensor | None, weight: Maker) -> Tensor:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    bias = None if bias is None else bias.to(dtype)
    if is_traced(x):
        return F.linear(x.to(dtype), weight(dtype), bias)
    found = packed.product(x.to(dtype), weight.args[0])
    if found is not None:
        return found if bias is None else found.add_(bias)
    with torch.autocast(device, enabled=False):
        found = on_gpu.linear(x.to(dtype), bias, weight.args[0])
        result: Tensor = _Linear.apply(x.to(dtype), bias, weight) if found is None else found
        return result


class _Linear(torch.autograd.Function):
    """x Wᵀ + bias, W made twice and kept never."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Maker) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad @ ctx.weight(grad.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


for _name in ("nf4_weight", "nf4_linear", "int_weight", "int_linear"):
    _LIBRARY.impl(_name, globals()[_name], "CompositeImplicitAutograd")

WEIGHTS = {
    torch.ops.surgeon.nf4_linear.default: torch.ops.surgeon.nf4_weight.default,
    torch.ops.surgeon.int_linear.default: torch.ops.surgeon.int_weight.default,
}
"""Operator of a quantised linear → the one that gives its weight, from the same arguments without x and bias."""

MAKERS: dict[Any, Callable[..., Maker]] = {
    torch.ops.surgeon.nf4_linear.default: nf4_maker,
    torch.ops.surgeon.int_linear.default: int_maker,
}
"""Operator of a quantised linear → what holds its weight in codes, from the same arguments without x and bias."""
