"""Linears whose weight is held in codes, as ONNX operators that read codes.

Integers become `com.microsoft.MatMulNBits`, whose zero points are integers. Those of a graph may be fractions, since a
merge of QA-LoRA moves them: what an integer zero point z' leaves of a zero point z is constant over a group, so

    x · scale (code - z) = x · scale (code - z') + Σ_groups sum(x of the group) · scale (z' - z)

is exact, with a product as small as there are groups; zero points in floating point would be 22 × slower on CPUs. Codes
of 3 bits are stored in 4. NF4 and FP4 become standard operators, which runtimes compute once when they load the model
(4 bits on disk), or `com.microsoft.MatMulBnb4`, which stays in 4 bits and is slow on CPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from surgeon.decode import byte_values
from surgeon.finalise import finalise
from surgeon.fold import fold, folds
from surgeon.graph import Graph, Holding, TensorSpec, sweep
from surgeon.hold import held_value, holders, release
from surgeon.numerics import BLOCK, Nested, dequantise_absmax
from surgeon.packing import pack, unpack
from surgeon.quantised import HELD, WEIGHTS
from surgeon.zero_points import fold_zero_points, unfoldable

NF4, INT = torch.ops.surgeon.nf4_linear.default, torch.ops.surgeon.int_linear.default
POINTS, SHIFT = "_points", "_shift"
SMALLEST = 16
"""Inputs per group, at least, that MatMulNBits takes; they are a power of two."""
Read = Callable[[], torch.Tensor]


def with_codes(graph: Graph) -> Graph:
    """The graph in its final form, its weights still in codes where adapters allow it.

    Adapters fold into the zero points where they are constant over groups, and otherwise stay beside the codes. Where
    one reads the weight, or stands over a weight that is not in codes, all are folded into decoded weights.
    """
    if not holders(graph):
        return finalise(graph)
    found = folds(graph)
    if found and not unfoldable(graph):
        return finalise(graph, fold_zero_points)
    reads = any(node.target in WEIGHTS.values() for _, node in graph.nodes())
    beside = not reads and all(graph.tensors[item.site.weight].held is not None for item in found)
    return finalise(graph, (lambda kept: kept) if beside else fold)


def prepared(graph: Graph) -> Graph:
    """The graph with its codes as the operators below read them; codes that no operator reads are decoded."""
    made, integers = graph.copy(), []
    for prefix, node in graph.nodes():
        if node.target not in (NF4, INT):
            continue
        name = graph.resolve(prefix + node.meta[HELD].target)
        holding = graph.tensors[name].held
        assert holding is not None
        if node.target is NF4:
            _read_book(made, holding, prefix, str(node.kwargs["kind"]))
        elif _fits(graph, holding, int(str(node.kwargs["bits"]))):
            integers.append((holding, int(str(node.kwargs["bits"]))))
        else:
            made.tensors[name] = replace(graph.tensors[name], held=None)
            made.inserted[name] = functools.partial(held_value, graph, name)
    points, shift = _zeros(graph, integers)
    for holding, bits in integers:
        _read_integers(made, holding, bits, points, shift)
    return made


def _zeros(graph: Graph, integers: list[tuple[Holding, int]]) -> tuple[bool, bool]:
    """Whether any zero point is not the one that MatMulNBits assumes, and whether any is a fraction."""
    points = shift = False
    for holding, bits in integers:
        zero = graph.inserted[holding.parts["zero"]]()
        nearest = _nearest(zero, bits)
        points |= not bool((nearest == 2 ** (_stored(bits) - 1)).all())
        shift |= not torch.equal(nearest.to(zero.dtype), zero)
        if points and shift:
            break
    return points, shift


def place(part: fx.Graph, prefix: str, graph: Graph, four_bit: str) -> None:
    """Put the functions below in the place of the linears of a part of a prepared graph."""
    for node in [node for node in part.nodes if node.target in (NF4, INT)]:
        weight = str(node.meta[HELD].target)
        x, bias, *parts = node.args
        with part.inserting_before(node):
            if graph.tensors[graph.resolve(prefix + weight)].held is None:
                release(node)
            elif node.target is NF4:
                book = part.get_attr(f"{node.kwargs['kind']}_book")
                node.target = by_book if four_bit == "standard" else by_bnb4
                node.args = (x, bias, *parts[:2], book)
            else:
                rest = [str(parts[2].target) + kind for kind in (POINTS, SHIFT)]
                known = [part.get_attr(r) if graph.resolve(prefix + r) in graph.tensors else None for r in rest]
                node.target, node.args = by_integers, (x, bias, *parts[:2], *known)
                node.kwargs = {"bits": _stored(int(node.kwargs["bits"]))}
    sweep(part)


def by_integers(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    points: torch.Tensor | None,
    shift: torch.Tensor | None,
    *,
    bits: int,
) -> torch.Tensor:
    """MatMulNBits: codes `[out, groups, group · bits / 8]`, scale `[out, groups]`, shift `[groups, out]`."""
    out, groups, width = codes.shape
    group = width * 8 // bits
    given = [x, codes, scale, *([] if points is None else [points])]
    options = {"K": groups * group, "N": out, "bits": bits, "block_size": group, "accuracy_level": 1}
    result = _symbolic("MatMulNBits", given, options, out)
    if shift is not None:
        result = result + x.unflatten(-1, (groups, group)).sum(-1) @ shift
    return result if bias is None else result + bias


def by_bnb4(
    x: torch.Tensor, bias: torch.Tensor | None, codes: torch.Tensor, absmax: torch.Tensor, _: Any, **of: Any
) -> torch.Tensor:
    """MatMulBnb4, whose bytes are bitsandbytes'."""
    options = {"K": of["inp"], "N": of["out"], "block_size": BLOCK, "quant_type": int(of["kind"] == "nf4")}
    result = _symbolic("MatMulBnb4", [x, codes, absmax], options, of["out"])
    return result if bias is None else result + bias


def by_book(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    book: torch.Tensor,
    *,
    out: int,
    inp: int,
    kind: str,
) -> torch.Tensor:
    """Values of the bytes, looked up, times absmax; book: `[256, 2]`."""
    values = F.embedding(codes.int(), book).reshape(-1)
    blocks = absmax.shape[0]
    values = F.pad(values, (0, blocks * BLOCK - 2 * codes.shape[0])) if blocks * BLOCK > 2 * codes.shape[0] else values
    weight = (values.reshape(blocks, BLOCK) * absmax[:, None]).reshape(-1)[: out * inp].reshape(out, inp)
    result = x @ weight.to(x.dtype).t()
    return result if bias is None else result + bias


def _symbolic(name: str, given: list[torch.Tensor], options: Mapping[str, int], out: int) -> torch.Tensor:
    x, size = given[0], [*given[0].shape[:-1], out]
    made = torch.onnx.ops.symbolic(f"com.microsoft::{name}", given, dict(options), dtype=x.dtype, shape=size, version=1)
    return made.to(x.device)  # symbolic operators trace as tensors of the CPU


def _fits(graph: Graph, holding: Holding, bits: int) -> bool:
    """Whether MatMulNBits takes groups of this size."""
    groups = graph.tensors[holding.parts["scale"]].shape[1]
    size = graph.tensors[holding.parts["codes"]].shape[1] * 8 // bits // groups
    return size >= SMALLEST and size & (size - 1) == 0


def _read_integers(made: Graph, holding: Holding, bits: int, points: bool, shift: bool) -> None:
    codes, scale, zero = (holding.parts[name] for name in ("codes", "scale", "zero"))
    read, step, exact, stored = made.inserted[codes], made.inserted[scale], made.inserted[zero], _stored(bits)
    out, groups = made.tensors[scale].shape
    width = made.tensors[codes].shape[1] * stored // bits // groups
    made.tensors[codes] = replace(made.tensors[codes], shape=(out, groups, width))
    made.inserted[codes] = lambda: _repacked(read(), bits, stored).reshape(out, groups, width)
    spec = made.tensors[zero]
    if points:
        shape = (out, -(-groups * stored // 8))
        made.tensors[zero + POINTS] = replace(spec, shape=shape, dtype=torch.uint8)
        made.inserted[zero + POINTS] = lambda: _packed_points(_nearest(exact(), bits), stored)
    if shift:
        made.tensors[zero + SHIFT] = replace(spec, shape=(groups, out))
        made.inserted[zero + SHIFT] = lambda: _shift(exact(), step(), bits)


def _stored(bits: int) -> int:
    return 4 if bits == 3 else bits


def _nearest(zero: torch.Tensor, bits: int) -> torch.Tensor:
    return zero.round().clamp(0, 2**bits - 1).to(torch.uint8)


def _shift(zero: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return ((_nearest(zero, bits).double() - zero.double()) * scale.double()).t().to(zero.dtype).contiguous()


def _repacked(codes: torch.Tensor, bits: int, stored: int) -> torch.Tensor:
    return codes if bits == stored else pack(unpack(codes, bits), stored)


def _packed_points(points: torch.Tensor, bits: int) -> torch.Tensor:
    return pack(F.pad(points, (0, -points.shape[1] % (8 // bits))), bits)


def _read_book(made: Graph, holding: Holding, prefix: str, kind: str) -> None:
    if "scale" in holding.parts:
        absmax, scale, offset = (holding.parts[name] for name in ("absmax", "scale", "offset"))
        parts = tuple(made.inserted[name] for name in (absmax, scale, offset))
        made.tensors[absmax] = replace(made.tensors[absmax], dtype=torch.float32)
        made.inserted[absmax] = functools.partial(_absmax, *parts)
    book = f"{kind}_book"
    made.tensors[book] = TensorSpec((256, 2), torch.float32, owner=holding.owner, parameter=False)
    made.inserted[book] = functools.partial(byte_values, kind)
    if prefix:
        made.ties[prefix + book] = book


def _absmax(codes: Read, scale: Read, offset: Read) -> torch.Tensor:
    return dequantise_absmax(codes(), Nested(scale(), offset()))
