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
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch.nn import functional as F

from surgeon.decode import byte_values
from surgeon.errors import UnsupportedError
from surgeon.finalise import finalise
from surgeon.fold import fold, folds
from surgeon.graph import Graph, Holding, TensorSpec, sweep
from surgeon.hold import held_value, holders, release
from surgeon.lower.onnx.join import INT4, UINT4
from surgeon.lower.onnx.products import by_blocks, by_bnb4, by_book, by_integers
from surgeon.numerics import Nested, dequantise_absmax
from surgeon.packing import pack, unpack
from surgeon.quantised import HELD, WEIGHTS
from surgeon.zero_points import fold_zero_points, unfoldable

NF4, INT = torch.ops.surgeon.nf4_linear.default, torch.ops.surgeon.int_linear.default
POINTS, SHIFT, SIDE = "_points", "_shift", "_side_"
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


@dataclass(frozen=True)
class Form:
    """How linears in codes are written.

    Attributes:
        four_bit: NF4 and FP4 as "standard" operators or as "bnb4".
        level: of MatMulNBits' accuracy: 1 computes in fp32, 4 rounds its input to 8 bits, which is faster.
        blocks: integers as standard DequantizeLinear in blocks, not as MatMulNBits.
        norms: the operator that RMS norms are, see `surgeon.lower.onnx.norms`; None for what torch writes.
    """

    four_bit: str = "standard"
    level: int = 1
    blocks: bool = False
    norms: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None


def prepared(graph: Graph, form: Form) -> Graph:
    """The graph with its codes as the operators read them; codes that no operator reads are decoded."""
    made, integers = graph.copy(), []
    for prefix, node in graph.nodes():
        if node.target not in (NF4, INT):
            continue
        name = graph.resolve(prefix + node.meta[HELD].target)
        holding = graph.tensors[name].held
        assert holding is not None
        if node.target is NF4:
            _read_book(made, holding, prefix, str(node.kwargs["kind"]))
        elif fits(graph, holding, int(str(node.kwargs["bits"]))):
            integers.append((holding, int(str(node.kwargs["bits"]))))
        else:
            made.tensors[name] = replace(graph.tensors[name], held=None)
            made.inserted[name] = functools.partial(held_value, graph, name)
    points, shift = _zeros(graph, integers)
    for holding, bits in integers:
        read = _read_blocks if form.blocks else _read_integers
        read(made, holding, bits, points, shift)
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


def place(part: fx.Graph, prefix: str, graph: Graph, form: Form) -> None:
    """Put the functions of `surgeon.lower.onnx.products` in the place of the linears of a part of a prepared graph."""
    for node in [node for node in part.nodes if node.target in (NF4, INT)]:
        weight = str(node.meta[HELD].target)
        x, bias, *parts = node.args
        with part.inserting_before(node):
            if graph.tensors[graph.resolve(prefix + weight)].held is None:
                release(node)
            elif node.target is NF4:
                book = part.get_attr(f"{node.kwargs['kind']}_book")
                node.target = by_book if form.four_bit == "standard" else by_bnb4
                node.args = (x, bias, *parts[:2], book)
            else:
                rest = [str(parts[2].target) + kind for kind in (POINTS, SHIFT)] + [weight + SIDE + p for p in "abus"]
                known = [part.get_attr(r) if graph.resolve(prefix + r) in graph.tensors else None for r in rest]
                node.target, node.args = by_blocks if form.blocks else by_integers, (x, bias, *parts[:2], *known)
                bits = _stored(int(node.kwargs["bits"]))
                node.kwargs = {"bits": bits} if form.blocks else {"bits": bits, "level": form.level}
    sweep(part)


def fits(graph: Graph, holding: Holding, bits: int) -> bool:
    """Whether MatMulNBits takes groups of the size that codes have."""
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


def _read_blocks(made: Graph, holding: Holding, bits: int, points: bool, shift: bool) -> None:
    """Codes `[in, out]`, scales and points `[groups, out]`; without points the codes are signed."""
    codes, scale, zero = (holding.parts[name] for name in ("codes", "scale", "zero"))
    read, step, exact, stored = made.inserted[codes], made.inserted[scale], made.inserted[zero], _stored(bits)
    out, groups = made.tensors[scale].shape
    kinds = {4: (INT4, UINT4), 8: (torch.int8, torch.uint8)}
    if stored not in kinds:
        what = f"DequantizeLinear has no codes of {bits} bits"
        raise UnsupportedError(what, codes, "--profile ort or genai reads them")
    kind, middle = kinds[stored][points], 0 if points else 2 ** (stored - 1)
    inputs = made.tensors[codes].shape[1] * 8 // bits
    made.tensors[codes] = replace(made.tensors[codes], shape=(inputs, out), dtype=kind)
    made.inserted[codes] = lambda: _signed(unpack(read(), bits), middle)
    made.tensors[scale] = replace(made.tensors[scale], shape=(groups, out))
    made.inserted[scale] = lambda: step().t().contiguous()
    if points:
        made.tensors[zero + POINTS] = replace(made.tensors[zero], shape=(groups, out), dtype=kind)
        made.inserted[zero + POINTS] = lambda: _nearest(exact(), bits).t().contiguous()
    if shift:
        made.tensors[zero + SHIFT] = replace(made.tensors[zero], shape=(groups, out))
        made.inserted[zero + SHIFT] = lambda: _shift(exact(), step(), bits)


def _signed(codes: torch.Tensor, middle: int) -> torch.Tensor:
    """`[out, in]` → `[in, out]`, less the middle."""
    turned = codes.t().contiguous()
    return (turned.to(torch.int16) - middle).to(torch.int8) if middle else turned


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
