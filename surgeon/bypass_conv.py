"""Low-rank bypasses beside convolutions. See `surgeon.bypass`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from surgeon.bypass_linear import Bypass, Shape
from surgeon.edit import Edit
from surgeon.errors import UnsupportedError

aten = torch.ops.aten
_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


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
        return self.base(edit, x, a)

    def weight(self, edit: Edit) -> fx.Node:
        """`[out, in · window]`."""
        return edit.call(aten.flatten.using_ints, edit.weight, 1, -1)

    def base(self, edit: Edit, x: fx.Node, weight: fx.Node) -> fx.Node:
        """The site's own convolution with the rows of a matrix as its kernel."""
        rows, *_ = weight.meta["val"].shape
        kernel = edit.call(aten.view.default, weight, [rows, self.site.inp // self.site.groups, *self.site.window])
        return edit.call(edit.node.target, x, kernel, None, *edit.node.args[3:], **edit.node.kwargs)

    def up(self, edit: Edit, low: fx.Node, b: fx.Node) -> fx.Node:
        """The convolution of b: `[b, r, ..]` → `[b, out, ..]`."""
        axes = len(self.site.window)
        kernel = edit.call(aten.view.default, b, [*self.b, *[1] * axes])
        plain = _CONVOLUTIONS[axes]
        return edit.call(plain, low, kernel, None, [1] * axes, [0] * axes, [1] * axes, self.site.groups)

    def bias(self, edit: Edit, c: fx.Node) -> fx.Node:
        """`[out, 1, ..]`."""
        return edit.call(aten.view.default, c, [self.site.out, *[1] * len(self.site.window)])

    def normal(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """With an axis of groups in front of both, if there are several."""
        groups = self.site.groups
        return (a, b) if groups == 1 else (a.unflatten(0, (groups, -1)), b.unflatten(0, (groups, -1)))

    def of_normal(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The other way."""
        return (a, b) if self.site.groups == 1 else (a.flatten(0, 1), b.flatten(0, 1))

    def packed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """PEFT's kernels: a `[r, in, *window]`, in which every row sees all groups and is zero off its own."""
        site, window = self.site, self.site.window
        if name == "b":
            return tensor.reshape(*self.b, *[1] * len(window))
        whole = tensor.new_zeros(site.groups, self.rank // site.groups, site.groups, self._inputs)
        own = torch.arange(site.groups)
        whole[own, :, own] = tensor.view(site.groups, -1, self._inputs)
        return whole.view(self.rank, site.inp, *window)

    def unpacked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Raises UnsupportedError for an adapter whose a mixes groups: no weight in groups can hold it."""
        site = self.site
        if name == "b":
            return tensor.flatten(1) if tensor.shape == (*self.b, *[1] * len(site.window)) else tensor
        if tensor.shape != (self.rank, site.inp, *site.window):
            return tensor
        whole = tensor.reshape(site.groups, -1, site.groups, self._inputs)
        own = torch.arange(site.groups)
        if site.groups > 1 and int(whole.count_nonzero()) != int(whole[own, :, own].count_nonzero()):
            what = "the adapter mixes the groups of a convolution, which its weight cannot hold"
            raise UnsupportedError(what, site.path, "PEFT cannot merge it either: train again without the module")
        return whole[own, :, own].reshape(self.a)
