"""Linears in codes as functions of torch and of ONNX operators, put in their place before lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F

from surgeon.numerics import BLOCK


def by_integers(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    points: torch.Tensor | None,
    shift: torch.Tensor | None,
    *side: torch.Tensor | None,
    bits: int,
    level: int,
) -> torch.Tensor:
    """MatMulNBits: codes `[out, groups, group · bits / 8]`, scale `[out, groups]`, shift `[groups, out]`.

    `side` is what stands beside the codes, see `beside`; `level` that of the operator's accuracy.
    """
    out, groups, width = codes.shape
    group = width * 8 // bits
    options = {"K": groups * group, "N": out, "bits": bits, "block_size": group, "accuracy_level": level}

    def product(x: torch.Tensor) -> torch.Tensor:
        given = [x, codes, scale, *([] if points is None else [points])]
        return shifted(_symbolic("MatMulNBits", given, options, out), x, shift)

    result = beside(x, product, *side)
    return result if bias is None else result + bias


def by_blocks(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    points: torch.Tensor | None,
    shift: torch.Tensor | None,
    *side: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """DequantizeLinear in blocks: codes `[in, out]`, signed without points; scale, points, shift `[groups, out]`."""
    (inp, _), groups = codes.shape, scale.shape[0]
    group = inp // groups
    given = [codes, scale, *([] if points is None else [points])]
    options: dict[str, Any] = {"axis": 0, "block_size": group}
    weight = torch.onnx.ops.symbolic("DequantizeLinear", given, options, dtype=x.dtype, shape=list(codes.shape))
    weight = weight.to(x.device)

    def product(x: torch.Tensor) -> torch.Tensor:
        return shifted(x @ weight, x, shift)

    result = beside(x, product, *side)
    return result if bias is None else result + bias


def shifted(result: torch.Tensor, x: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """result + pool(x) shift: float zero points beside integer ones, pool sums x `[.., in]` by group."""
    return result if shift is None else result + x.unflatten(-1, (len(shift), -1)).sum(-1) @ shift


def beside(
    x: torch.Tensor,
    product: Callable[[torch.Tensor], torch.Tensor],
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    u: torch.Tensor | None = None,
    s: torch.Tensor | None = None,
) -> torch.Tensor:
    """s ⊙ (product(u ⊙ x) + (u ⊙ x) a b): the normal form beside codes, a `[in, r]`, b `[r, out]`."""
    x = x if u is None else x * u
    result = product(x)
    if a is not None and b is not None and a.shape[1]:
        result = result + (x @ a) @ b
    return result if s is None else result * s


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
