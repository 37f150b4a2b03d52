"""Low-rank bypasses beside matrices: linears, embeddings, experts. See `surgeon.bypass`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.edit import Edit
from surgeon.sites import Site

aten = torch.ops.aten
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Bypass:
    """Beside a linear or Hugging Face's Conv1D: a `[r, in]`, b `[out, r]`.

    Attributes:
        site: where.
        rank: r.
    """

    site: Site
    rank: int

    @property
    def a(self) -> Shape:
        """The shape of a."""
        return self.rank, self.site.inp

    @property
    def b(self) -> Shape:
        """The shape of b."""
        return self.site.out, self.rank

    @property
    def first(self) -> tuple[str, str]:
        """Kinds of first values (see `surgeon.initial`) of a and b, whose product is zero."""
        return "kaiming", "zeros"

    @property
    def limit(self) -> int:
        """The highest rank that a change of the weight can have."""
        return min(self.site.inp, self.site.out)

    @property
    def parameters(self) -> int:
        """Numbers in a and b."""
        return torch.Size(self.a).numel() + torch.Size(self.b).numel()

    @property
    def macs(self) -> int:
        """Multiply-adds per token (per position of the output, at a convolution)."""
        return self.rank * (self.site.inp + self.site.out)

    @property
    def whole_rank(self) -> int:
        """The rank of the change of the whole weight; r, but where parts of it have a bypass each."""
        return self.rank

    def unfit(self) -> str:
        """Why there is no bypass of this rank here, or ""."""
        return ""

    def down(self, edit: Edit, x: fx.Node, a: fx.Node) -> fx.Node:
        """A x: `[.., in]` → `[.., r]`."""
        return edit.linear(x, a)

    def up(self, edit: Edit, low: fx.Node, b: fx.Node) -> fx.Node:
        """B A x: `[.., r]` → `[.., out]`."""
        return edit.linear(low, b)

    def bias(self, edit: Edit, c: fx.Node) -> fx.Node:
        """A vector `[out]` as it is added to, or multiplies, what `up` gives."""
        return c

    def weight(self, edit: Edit) -> fx.Node:
        """The weight of the site as a matrix `[out, in]`."""
        return edit.call(aten.t.default, edit.weight) if self.site.transposed else edit.weight

    def base(self, edit: Edit, x: fx.Node, weight: fx.Node) -> fx.Node:
        """What the site makes of another x with that matrix, without its bias."""
        return edit.linear(x, weight)

    def normal(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b of the normal form, whose product has the shape of `Site.matrix`."""
        return a, b

    def of_normal(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The other way."""
        return a, b

    def packed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """a or b, by that name, as PEFT's files have it."""
        return tensor

    def unpacked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The other way; a tensor of another shape than `packed` gives comes back as it is."""
        return tensor


@dataclass(frozen=True)
class TableBypass(Bypass):
    """Beside an embedding: x is token ids, and A x is a look-up in aᵀ. Here a is what begins at zero."""

    @property
    def first(self) -> tuple[str, str]:
        """As in the reference code and PEFT."""
        return "zeros", "normal"

    @property
    def macs(self) -> int:
        """b alone multiplies."""
        return self.rank * self.site.out

    def down(self, edit: Edit, x: fx.Node, a: fx.Node) -> fx.Node:
        """Columns of a: `[..]` → `[.., r]`."""
        return edit.call(aten.embedding.default, edit.call(aten.transpose.int, a, 0, 1), x)


@dataclass(frozen=True)
class ExpertBypass(Bypass):
    """Beside a layer's experts in one tensor: a `[n, r, in]`, b `[n, out, r]` for n of them.

    Where n is not all, the others have zeros between those: in the graph, in the normal form and in PEFT's files.

    Attributes:
        chosen: the experts that are adapted, in order; () for all.
    """

    chosen: tuple[int, ...] = ()

    @property
    def _count(self) -> int:
        return len(self.chosen) or self.site.experts

    @property
    def a(self) -> Shape:
        """The shape of a."""
        return self._count, self.rank, self.site.inp

    @property
    def b(self) -> Shape:
        """The shape of b."""
        return self._count, self.site.out, self.rank

    @property
    def macs(self) -> int:
        """Of the experts that a token is sent to."""
        return self.site.used * super().macs

    def down(self, edit: Edit, x: fx.Node, a: fx.Node) -> fx.Node:
        """A_e x for the expert e a row was sent to: `[n, in]` → `[n, r]`."""
        return edit.call(torch.ops.surgeon.expert_linear.default, x, self._spread(edit.call, a), edit.argument(2))

    def up(self, edit: Edit, low: fx.Node, b: fx.Node) -> fx.Node:
        """B_e A_e x: `[n, r]` → `[n, out]`."""
        return edit.call(torch.ops.surgeon.expert_linear.default, low, self._spread(edit.call, b), edit.argument(2))

    def _spread(self, call: Callable[..., Any], tensor: Any) -> Any:
        """`[n, ..]` → `[experts, ..]`, zeros for the others."""
        if not self.chosen:
            return tensor
        sizes = list((tensor.meta["val"] if isinstance(tensor, fx.Node) else tensor).shape[1:])
        parts, position = [], 0
        for taken, run in itertools.groupby(range(self.site.experts), self.chosen.__contains__):
            count = len(list(run))
            if taken:
                parts.append(call(aten.slice.Tensor, tensor, 0, position, position + count))
                position += count
            else:
                parts.append(call(aten.new_zeros.default, tensor, [count, *sizes]))
        return call(aten.cat.default, parts, 0)

    def normal(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of all experts."""
        return self._spread(_call, a), self._spread(_call, b)

    def packed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """PEFT's matrices: a `[experts · r, in]` goes expert by expert, b `[out, r · experts]` rank by rank."""
        return self._matrix(name, self._spread(_call, tensor))

    def unpacked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The other way; the other experts' part is dropped."""
        whole = self._experts(name, tensor)
        return whole if whole is tensor or not self.chosen else whole[list(self.chosen)].contiguous()

    def _matrix(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(0, 1) if name == "a" else tensor.permute(1, 2, 0).flatten(1)

    def _experts(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        count, rank = self.site.experts, self.rank
        if name == "a":
            return tensor.unflatten(0, (count, rank)) if tensor.shape == (count * rank, self.site.inp) else tensor
        wanted = (self.site.out, rank * count)
        return tensor.unflatten(1, (rank, count)).permute(2, 0, 1).contiguous() if tensor.shape == wanted else tensor


@dataclass(frozen=True)
class BatchedExpertBypass(ExpertBypass):
    """The same where every expert sees rows of its own, `[experts, n, in]`.

    PEFT takes such a weight, `[experts, in, out]`, for one stored output first: its A is our b, and its B our a.
    """

    def down(self, edit: Edit, x: fx.Node, a: fx.Node) -> fx.Node:
        """`[experts, n, in]` → `[experts, n, r]`."""
        return edit.call(aten.bmm.default, x, edit.call(aten.transpose.int, self._spread(edit.call, a), 1, 2))

    def up(self, edit: Edit, low: fx.Node, b: fx.Node) -> fx.Node:
        """`[experts, n, r]` → `[experts, n, out]`."""
        return edit.call(aten.bmm.default, low, edit.call(aten.transpose.int, self._spread(edit.call, b), 1, 2))

    def _matrix(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """b as PEFT's A `[experts · r, out]`, a as its B `[in, r · experts]`."""
        return super()._matrix("b" if name == "a" else "a", tensor.transpose(1, 2))

    def _experts(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        count, rank = self.site.experts, self.rank
        if name == "b" and tensor.shape == (count * rank, self.site.out):
            return tensor.unflatten(0, (count, rank)).transpose(1, 2).contiguous()
        if name == "a" and tensor.shape == (self.site.inp, rank * count):
            return tensor.unflatten(1, (rank, count)).permute(2, 1, 0).contiguous()
        return tensor


def _call(operator: Any, *args: Any) -> Any:
    return operator(*args)
