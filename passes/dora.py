"""DoRA: y = m / ‖W + s B A‖ ⊙ (W x + s B A x) + bias, magnitudes apart from directions (Liu et al. 2024, eq. 5)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.passes.base import CONV, CONV1D, EMBEDDING, LINEAR, Cost
from surgeon.passes.lora import Lora

if TYPE_CHECKING:
    import torch
    from torch import fx

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.normal import Base, Normal
    from surgeon.sites import Site


@dataclass(frozen=True)
class Dora(Lora):
    """A LoRA that changes directions, and beside it a magnitude for every output.

    a and b as in LoRA, m: `[out]`, at first the norms of the rows of W, so that the model is unchanged until trained.
    The norm of W + s B A follows a and b and is not differentiated (§4.3). It is computed from ‖w‖², W Aᵀ and A Aᵀ:
    no second matrix of W's size is made. At an embedding a row is one feature of every word.

    Options:
        dropout: on the input of everything but what the base returns, while training, as in PEFT: with it a step
            multiplies by W twice.
    """

    name: ClassVar[str] = "dora"
    keeps: ClassVar[str] = "close"
    stacks: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D, EMBEDDING, CONV)
    reads_weight: ClassVar[bool] = True
    has_parts: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False
    peft_packed: ClassVar[bool] = False

    def cost(self, site: Site) -> Cost:
        """LoRA's, and m."""
        cost = super().cost(site)
        return dataclasses.replace(cost, trained=cost.trained + site.out, stored=cost.stored + site.out)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """(y + s b a x) ⊙ g + bias ⊙ (1 − g), g = m / norm; with dropout y + g ⊙ (W x' + s b a x') − W x'."""
        import torch

        aten, made = torch.ops.aten, self.bypass(site)
        drops = self.dropout > 0 and site.kind != EMBEDDING
        x = edit.dropout(edit.x, self.dropout) if drops else edit.x
        weight = made.weight(edit)
        plain = made.base(edit, x, weight) if drops else edit.y
        a, b = self.factors(edit, made)
        total = edit.add(plain, edit.mul(made.up(edit, made.down(edit, x, a), b), self.scale))
        gain = edit.call(aten.div.Tensor, edit.param("m", (site.out,), "ones"), self._norm(edit, weight, a, b))
        scaled = edit.mul(total, made.bias(edit, gain))
        if drops:
            edit.replace(edit.add(edit.call(aten.sub.Tensor, edit.y, plain), scaled))
        elif edit.bias is None:
            edit.replace(scaled)
        else:
            kept = edit.call(aten.sub.Tensor, edit.bias, edit.mul(edit.bias, gain))
            edit.replace(edit.add(scaled, made.bias(edit, kept)))

    def unfit(self, site: Site) -> str:
        """PEFT has none where a convolution has groups; the norm of W + s B A would need one product per group."""
        return "it is a convolution in groups" if site.groups > 1 else super().unfit(site)

    def _norm(self, edit: Edit, weight: fx.Node, a: fx.Node, b: fx.Node) -> fx.Node:
        """‖W + s b a‖ `[out]` by rows: √(‖w‖² + 2 s b · W aᵀ + s² b · (a aᵀ) b)."""
        import torch

        from surgeon.first_norms import TINY

        aten = torch.ops.aten
        a, b = edit.call(aten.detach.default, a), edit.call(aten.detach.default, b)
        length = edit.call(aten.linalg_vector_norm.default, weight, 2, [1], dtype=torch.float32)
        cross = edit.mul(edit.linear(weight, a), 2 * self.scale)
        square = edit.mul(edit.linear(b, edit.linear(a, a)), self.scale**2)
        change = edit.call(aten.sum.dim_IntList, edit.mul(edit.add(cross, square), b), [1])
        whole = edit.add(edit.mul(length, length), change)
        return edit.call(aten.sqrt.default, edit.call(aten.clamp_min.default, whole, TINY**2))

    def initialise(self, graph: Graph, owner: str, seed: int, tokenizer: Any) -> None:
        """m: the norms of the rows of what the base and the first a and b make together."""
        super().initialise(graph, owner, seed, tokenizer)
        from surgeon.first_norms import FirstNorms
        from surgeon.fold import value_of
        from surgeon.sites import sites

        for site in sites(graph, *self.kinds):
            names = [site.tensor(owner, word) for word in "mab"]
            if names[0] in graph.tensors:
                scale = 0.0 if self.moves else self.at(site).scale  # what a and b begin with is taken away again
                first = [graph.inserted[name] for name in names[1:]]
                weight = functools.partial(value_of, graph, site.weight)
                graph.inserted[names[0]] = FirstNorms(weight, site, scale, *first)

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """LoRA's with the factor m / ‖W + s b a‖ on the output, in PEFT's order."""
        from surgeon.first_norms import row_norms

        found = super().normal(params, site, base)
        delta = found.delta()
        assert delta is not None
        return dataclasses.replace(found, s=params["m"].float() / row_norms(base.weight().float() + delta))

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """LoRA's fields, with `use_dora`."""
        return {**super().peft_config(sites), "use_dora": True}

    def peft_keys(self, site: Site) -> dict[str, str]:
        """LoRA's, and the magnitudes."""
        return {**super().peft_keys(site), "m": f"model.{site.path}.lora_magnitude_vector"}

    def packed(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """At a convolution PEFT's magnitudes are `[1, out, 1, ..]`."""
        if name != "m":
            return super().packed(name, tensor, site)
        return tensor.reshape(1, -1, *[1] * len(site.window)) if site.window else tensor

    def unpacked(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """The other way."""
        if name != "m":
            return super().unpacked(name, tensor, site)
        wanted = (1, site.out, *[1] * len(site.window))
        return tensor.flatten() if site.window and tensor.shape == wanted else tensor
