"""The normal form: what every trained adapter is, whatever method trained it.

    y = s ⊙ ((u ⊙ x) Wᵀ + scale · pool_group(u ⊙ x) aᵀ bᵀ) + bias

A back end (merge, ONNX slots, the server's pool, PEFT files) reads `Normal`s and knows no method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from surgeon.errors import UnsupportedError


@dataclass(frozen=True)
class Base:
    """What an adapter may need to know of the layer it adapts; read only when asked for.

    Attributes:
        weight: W `[out, in]` (experts: `[experts, out, in]`), dequantised where the base is quantised.
        bias: b `[out]`, or None.
    """

    weight: Callable[[], torch.Tensor]
    bias: Callable[[], torch.Tensor | None] = lambda: None


@dataclass(frozen=True)
class Replaced:
    """Rows or columns of a weight `[out, in]` that others stand for.

    Attributes:
        axis: −2 for rows (outputs), −1 for columns (inputs: the tokens of an embedding).
        index: which, `[n]`.
        values: `[n, in]` or `[out, n]`.
    """

    axis: int
    index: torch.Tensor
    values: torch.Tensor

    def put(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with them in it, a new one."""
        return weight.index_copy(self.axis, self.index.to(weight.device), self.values.to(weight))

    def part(self, axis: int, kept: slice) -> Replaced:
        """What is left of them in a part of the weight's rows or columns."""
        if axis != self.axis:
            return dataclasses.replace(self, values=self.values[kept] if axis == -2 else self.values[:, kept])
        inside = (self.index >= kept.start) & (self.index < kept.stop)
        values = self.values[inside] if axis == -2 else self.values[:, inside]
        return Replaced(axis, self.index[inside] - kept.start, values)


@dataclass(frozen=True)
class Normal:
    """One adapter at one linear, in normal form, over the layer as the adapters below it leave it.

    Experts have one more axis in front of everything: a `[experts, r, in]`, b `[experts, out, r]`, u `[experts, in]`,
    s and bias `[experts, out]`.

    Attributes:
        scale: kept apart from `b`: (b @ a) · scale is PEFT's order, and folding it first changes the last bit.
        divisor: of the scale, for those whose order is (b @ a) · scale / divisor.
        product: (a₂, b₂) of the shapes of a and b: b a ⊙ b₂ a₂ stands for b a (LoHa). None for none.
        a: `[r, in]`, or `[r, in / group]`. None for none.
        b: `[out, r]`.
        u: factor on the input `[in]`.
        s: factor on the output before the bias `[out]`.
        bias: the bias `[out]` in place of the base's; None keeps it. Only passes that say `changes_bias` have one.
        replaced: rows or columns of the weight that others stand for, whatever is folded in below.
        group: number of consecutive inputs that are summed into one (QA-LoRA); 1 for none.
    """

    scale: float = 1.0
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    u: torch.Tensor | None = None
    s: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    group: int = 1
    divisor: float = 1.0
    product: tuple[torch.Tensor, torch.Tensor] | None = None
    replaced: Replaced | None = None

    def delta(self) -> torch.Tensor | None:
        """scale / divisor · b a `[out, in]` in fp32, groups expanded; None without a and b."""
        if self.a is None or self.b is None:
            return None
        product = self.b.float() @ self.a.float()
        if self.product is not None:
            product.mul_(self.product[1].float() @ self.product[0].float())
        product.mul_(self.scale)
        if self.divisor != 1:
            product.div_(self.divisor)
        return product.repeat_interleave(self.group, -1) if self.group > 1 else product

    def factored(self) -> Normal:
        """The same without a product: a `[r², in]` and b `[out, r²]` of the products of all pairs of rows."""
        if self.product is None or self.a is None or self.b is None:
            return self
        a, b = (
            x.float()[..., :, None, :] * y.float()[..., None, :, :] for x, y in _pairs(self.a, self.b, self.product)
        )
        return dataclasses.replace(self, a=a.flatten(-3, -2), b=b.flatten(-3, -2).transpose(-1, -2), product=None)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight `[out, in]` that computes what base and adapter compute together, in fp32 (fp64 stays fp64)."""
        result = weight if weight.dtype == torch.float64 else weight.float()
        delta = self.delta()
        if delta is not None:
            result = delta.to(result.dtype).add_(result)
        if self.u is not None:
            result = result * self.u.to(result.dtype)[..., None, :]
        if self.s is not None:
            result = result * self.s.to(result.dtype)[..., None]
        return result if self.replaced is None else self.replaced.put(result)

    def outputs(self, rows: slice) -> Normal:
        """The adapter of some of the outputs."""
        b = None if self.b is None else self.b[..., rows, :]
        product = None if self.product is None else (self.product[0], self.product[1][..., rows, :])
        s, bias = (None if vector is None else vector[..., rows] for vector in (self.s, self.bias))
        replaced = None if self.replaced is None else self.replaced.part(-2, rows)
        return dataclasses.replace(self, b=b, s=s, bias=bias, product=product, replaced=replaced)

    def inputs(self, columns: slice) -> Normal:
        """The adapter of some of the inputs (of a whole number of groups)."""
        a = self.a if self.a is None or self.group == 1 else self.a.repeat_interleave(self.group, -1)
        u = None if self.u is None else self.u[..., columns]
        product = None if self.product is None else (self.product[0][..., columns], self.product[1])
        replaced = None if self.replaced is None else self.replaced.part(-1, columns)
        a = None if a is None else a[..., columns]
        return dataclasses.replace(self, a=a, u=u, group=1, product=product, replaced=replaced)

    def experts(self, chosen: slice) -> Normal:
        """The adapter of some of the experts."""
        a, b, u, s, bias = (None if t is None else t[chosen] for t in (self.a, self.b, self.u, self.s, self.bias))
        product = None if self.product is None else (self.product[0][chosen], self.product[1][chosen])
        return dataclasses.replace(self, a=a, b=b, u=u, s=s, bias=bias, product=product)


@dataclass(frozen=True)
class Factors:
    """A change of a linear that is two matrices other sites and adapters share, between vectors of its own (VeRA).

    b a of the normal form is diag(out) b diag(low) a.

    Attributes:
        a: `[r, in]`.
        b: `[out, r]`.
        low: `[r]`.
        out: `[out]`.
        name: of the pair: equal names are equal matrices, of which wider layers have more columns of a and rows of b.
    """

    a: torch.Tensor
    b: torch.Tensor
    low: torch.Tensor
    out: torch.Tensor
    name: str


@dataclass(frozen=True)
class Columns:
    """Learned K/V columns at one attention (prefix tuning, P-Tuning v2).

    Attributes:
        k: keys `[h_kv, p, d]`, after rotary.
        v: values `[h_kv, p, d_v]`.
        column_bias: learned additive score per column `[h | 1, p]`, None for none.
        windowed: whether a sliding window hides the columns, as it does in PEFT.
    """

    k: torch.Tensor
    v: torch.Tensor
    column_bias: torch.Tensor | None = None
    windowed: bool = True


def _pairs(
    a: torch.Tensor, b: torch.Tensor, product: tuple[torch.Tensor, torch.Tensor]
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Rows of both a's, and columns of both b's as rows."""
    return (a, product[0]), (b.transpose(-1, -2), product[1].transpose(-1, -2))


def compose(outer: Normal, inner: Normal) -> Normal:
    """One Normal for two stacked adapters that read the same input, `outer` applied to the merge of `inner`.

    Raises:
        UnsupportedError: there is none: `inner` changes input or output scales that `outer` would have to see, or the
            two pool differently.
    """
    outer, inner = outer.factored(), inner.factored()
    if outer.u is not None or inner.u is not None or inner.s is not None:
        raise UnsupportedError(
            "these adapters scale the same input or output twice", "", "merge them one after another"
        )
    if outer.replaced is not None or inner.replaced is not None:
        raise UnsupportedError("rows of the weight are replaced", "", "merge them one after another")
    if outer.group != inner.group and None not in (outer.a, inner.a):
        raise UnsupportedError(
            f"the adapters pool groups of {outer.group} and {inner.group}", "", "merge them in order"
        )
    if inner.a is None or inner.b is None:
        return dataclasses.replace(outer, bias=outer.bias if outer.bias is not None else inner.bias)
    if outer.a is None or outer.b is None:
        return dataclasses.replace(inner, s=outer.s, bias=outer.bias if outer.bias is not None else inner.bias)
    a = torch.cat([outer.a, inner.a], -2)
    factors = (outer.scale / outer.divisor, inner.scale / inner.divisor)
    b = torch.cat([outer.b * factors[0], inner.b * factors[1]], -1)
    bias = outer.bias if outer.bias is not None else inner.bias
    return Normal(1.0, a, b, s=outer.s, bias=bias, group=max(outer.group, inner.group))
