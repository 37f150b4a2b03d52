"""The arithmetic of a low-rank bypass, y + s · up(down(x)), for each kind of place it stands beside.

At every place a and b are matrices, with the rank on the last axis but one of a and on the last axis of b (experts have
one axis more in front of both). `bypass_at` gives the `Bypass` of a site: the shapes, the nodes of down and up, what
the pair is in the normal form, and what it costs. Methods decide what stands between: a scale, diag(λ), a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from surgeon.edit import Edit
from surgeon.sites import CONV, EMBEDDING, EXPERTS, Site

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

    def unfit(self) -> str:
        """Why there is no bypass of this rank here, or ""."""
        return ""

    def down(self, edit: Edit, x: fx.Node, a: fx.Node) -> fx.Node:
        """A x: `[.., in]` → `[.., r]`."""
        return edit.linear(x, a)

    def up(self, edit: Edit, low: fx.Node, b: fx.Node) -> fx.Node:
        """B A x: `[.., r]` → `[.., out]`."""
        return edit.linear(low, b)

    def normal(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b of the normal form, whose product has the shape of `Site.matrix`."""
        return a, b


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
    """Beside a layer's experts in one tensor: a `[experts, r, in]`, b `[experts, out, r]`."""

    @property
    def a(self) -> Shape:
        """The shape of a."""
        return self.site.experts, self.rank, self.site.inp

    @property
    def b(self) -> Shape:
        """The shape of b."""
        return self.site.experts, self.site.out, self.rank

    def down(self, edit: Edit, x: fx.Node, a: fx.Node) -> fx.Node:
        """A_e x for the expert e a row was sent to: `[n, in]` → `[n, r]`."""
        return edit.call(torch.ops.surgeon.expert_linear.default, x, a, edit.argument(2))

    def up(self, edit: Edit, low: fx.Node, b: fx.Node) -> fx.Node:
        """B_e A_e x: `[n, r]` → `[n, out]`."""
        return edit.call(torch.ops.surgeon.expert_linear.default, low, b, edit.argument(2))


@dataclass(frozen=True)
class ConvBypass(Bypass):
    """Beside a convolution: A is one of the same window, stride, padding and groups, B one of window 1.

    a `[r, in / groups · window]`, b `[out, r / groups]`: every group of channels has its own pair of rank r / groups,
    so that B A is a change of the (grouped) weight.
    """

    @property
    def a(self) -> Shape:
        """The shape of a."""
        return self.rank, self._inputs

    @property
    def b(self) -> Shape:
        """The shape of b."""
        return self.site.out, self.rank // self.site.groups

    @property
    def _inputs(self) -> int:
        """Numbers that one output reads."""
        return self.site.inp // self.site.groups * torch.Size(self.site.window).numel()

    @property
    def limit(self) -> int:
        """Over all groups."""
        return min(self._inputs, self.site.out // self.site.groups) * self.site.groups

    @property
    def macs(self) -> int:
        """Per position of the output."""
        return self.parameters

    def unfit(self) -> str:
        """As in PEFT, every group has the same rank."""
        groups = self.site.groups
        return f"rank {self.rank} is no multiple of its {groups} groups" if self.rank % groups else ""

    def down(self, edit: Edit, x: fx.Node, a: fx.Node) -> fx.Node:
        """The convolution of a: `[b, in, ..]` → `[b, r, ..]`."""
        kernel = edit.call(aten.view.default, a, [self.rank, self.site.inp // self.site.groups, *self.site.window])
        return edit.call(edit.node.target, x, kernel, None, *edit.node.args[3:], **edit.node.kwargs)

    def up(self, edit: Edit, low: fx.Node, b: fx.Node) -> fx.Node:
        """The convolution of b: `[b, r, ..]` → `[b, out, ..]`."""
        axes = len(self.site.window)
        kernel = edit.call(aten.view.default, b, [*self.b, *[1] * axes])
        plain = _CONVOLUTIONS[axes]
        return edit.call(plain, low, kernel, None, [1] * axes, [0] * axes, [1] * axes, self.site.groups)

    def normal(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """With an axis of groups in front of both, if there are several."""
        groups = self.site.groups
        return (a, b) if groups == 1 else (a.unflatten(0, (groups, -1)), b.unflatten(0, (groups, -1)))


_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_KINDS: dict[str, type[Bypass]] = {EMBEDDING: TableBypass, EXPERTS: ExpertBypass, CONV: ConvBypass}


def bypass_at(site: Site, rank: int) -> Bypass:
    """The bypass of this rank at a site."""
    return _KINDS.get(site.kind, Bypass)(site, rank)
