"""Low-rank bypasses beside some parts of a fused projection. See `surgeon.bypass`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.bypass_linear import Bypass, Shape
from surgeon.edit import Edit
from surgeon.errors import UsageError
from surgeon.parts import Layout

aten = torch.ops.aten


@dataclass(frozen=True)
class PartsBypass(Bypass):
    """A bypass of rank r for each of some parts of a fused projection: a `[parts, r, in]`, b `[rows of them, r]`.

    Rows of b are in the order of the projection's outputs within a part, part after part. Outputs of other parts get
    no change.

    Attributes:
        layout: of the projection's outputs.
        parts: those that have a bypass.
    """

    layout: Layout
    parts: tuple[str, ...]

    @property
    def a(self) -> Shape:
        """The shape of a."""
        return len(self.parts), self.rank, self.site.inp

    @property
    def b(self) -> Shape:
        """The shape of b."""
        return sum(map(self.layout.rows, self.parts)), self.rank

    @property
    def limit(self) -> int:
        """That of the smallest part."""
        return min(self.site.inp, *map(self.layout.rows, self.parts))

    @property
    def macs(self) -> int:
        """Of a, and of b between zeros."""
        return self.whole_rank * (self.site.inp + self.site.out)

    @property
    def whole_rank(self) -> int:
        """Parts stand beside one another."""
        return self.rank * len(self.parts)

    def down(self, edit: Edit, x: fx.Node, a: fx.Node) -> fx.Node:
        """`[.., in]` → `[.., parts · r]`."""
        return edit.linear(x, edit.call(aten.flatten.using_ints, a, 0, 1))

    def up(self, edit: Edit, low: fx.Node, b: fx.Node) -> fx.Node:
        """`[.., parts · r]` → `[.., out]`."""
        return edit.linear(low, self._spread(edit.call, b))

    def normal(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One matrix each: a `[parts · r, in]`, and b `[out, parts · r]`, zero between an output and another part."""
        return a.flatten(0, 1), self._spread(_call, b)

    def packed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """That of one LoRA of rank parts · r."""
        return tensor.flatten(0, 1) if name == "a" else self._spread(_call, tensor)

    def unpacked(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Raises UsageError for an adapter that changes an output by what belongs to another part."""
        if name == "a":
            fits = tensor.shape == (self.whole_rank, self.site.inp)
            return tensor.unflatten(0, (len(self.parts), -1)) if fits else tensor
        if tensor.shape != (self.site.out, self.whole_rank):
            return tensor
        places = self._spread(_call, torch.ones(self.b))
        if bool(tensor[places == 0].any()):
            what = "the adapter changes an output by what belongs to another part"
            raise UsageError(what, self.site.path, "it is no adapter of these parts: read it as a plain lora")
        turned = [tensor[:, i * self.rank : (i + 1) * self.rank] for i in range(len(self.parts))]
        return torch.cat([t[places[:, i * self.rank] != 0] for i, t in enumerate(turned)])

    def _spread(self, call: Callable[..., Any], b: Any) -> Any:
        """b `[rows, r]` → `[out, parts · r]`: rows where they belong, zeros elsewhere."""
        count, first, taken = len(self.parts), 0, dict.fromkeys(self.parts, 0)
        blocks = {}
        for i, part in enumerate(self.parts):
            rows = self.layout.rows(part)
            own = call(aten.slice.Tensor, b, 0, first, first + rows)
            own = call(aten.constant_pad_nd.default, own, [i * self.rank, (count - 1 - i) * self.rank])
            blocks[part] = call(aten.view.default, own, [self.layout.repeats, -1, count * self.rank])
            first += rows
        runs = []
        for part, rows in self.layout.runs:
            if part in blocks:
                runs.append(call(aten.slice.Tensor, blocks[part], 1, taken[part], taken[part] + rows))
                taken[part] += rows
            else:
                runs.append(call(aten.new_zeros.default, b, [self.layout.repeats, rows, count * self.rank]))
        return call(aten.view.default, call(aten.cat.default, runs, 1), [self.site.out, count * self.rank])


def _call(target: Callable[..., Any], *args: Any) -> Any:
    return target(*args)
