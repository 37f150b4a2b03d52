"""What codes of a base's weights and the adapters beside them come to: weights that torch can be given to compare with.

    W' = s ⊙ (Q(W) ⊙ u + scale · b a)

where Q(W) are the codes' values, and u, a, b, s the normal form of the adapter over W, which it was trained over.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from surgeon.errors import UnsupportedError
from surgeon.finalise import finalise
from surgeon.fold import Fold, by_weight, folds, normals, value_of
from surgeon.graph import Graph
from surgeon.hold import held_value
from surgeon.lower.onnx import whole
from surgeon.lower.onnx.overlay import Overlay, decoded, untied
from surgeon.lower.virtual_columns import as_columns
from surgeon.normal import Normal, compose
from surgeon.passes.intq import IntQ
from surgeon.sites import Site

SIDE, WHOLE = "side", "whole"


@dataclass(frozen=True)
class Effective:
    """The linears of a graph that a quantiser has codes for.

    Attributes:
        graph: with its adapters and codes.
        plain: the same with the adapters merged, codes decoded, the head untied.
        step: what makes codes of a weight.
    """

    graph: Graph
    plain: Graph
    step: IntQ

    @functools.cached_property
    def groups(self) -> Mapping[str, list[Fold]]:
        """The adapters of every weight."""
        return by_weight(self.graph, folds(self.graph))

    @functools.cached_property
    def sites(self) -> list[Site]:
        """The linears."""
        return [site for site in self.step.match(self.plain) if isinstance(site, Site)]

    def base(self, site: Site) -> torch.Tensor:
        """The weight without adapters."""
        return value_of(self.graph, self.graph.resolve(site.weight))

    def normal(self, site: Site) -> Normal | None:
        """The adapters of a linear as one; an empty one without, None if there is none."""
        group = self.groups.get(site.weight, [])
        if not group:
            return Normal()
        weight = functools.partial(lambda: site.matrix(self.base(site).float()))
        try:
            made = normals(group, weight, lambda: value_of(self.graph, site.bias) if site.bias else None)
            one = functools.reduce(lambda inner, outer: compose(outer, inner), made).factored()
        except UnsupportedError:
            return None
        return None if one.replaced is not None else one

    def rounded(self, matrix: torch.Tensor, site: Site) -> torch.Tensor:
        """What the codes of a matrix decode to."""
        return self.step.decode(self.step.encode(matrix), site)

    def own_codes(self, site: Site) -> Mapping[str, str]:
        """The base's own codes of a weight, where they are of the kind that is written."""
        spec = self.graph.tensors.get(site.weight)
        return spec.held.parts if spec is not None and spec.held is not None and "zero" in spec.held.parts else {}

    def weight(self, site: Site, how: str) -> torch.Tensor:
        """The weight that its codes come to, with its adapter, or what trained of it whole, beside them."""
        if how not in (SIDE, WHOLE):
            return site.stored(self.rounded(site.matrix(self.plain.values[site.weight].float()), site))
        if self.own_codes(site):
            codes = site.matrix(held_value(self.graph, site.weight))
        elif how == WHOLE:
            codes = self.rounded(site.matrix(self.graph.values[site.weight].float()), site)
            codes = codes + whole.change(self.graph, site)
        else:
            codes = self.rounded(site.matrix(self.base(site).float()), site)
        normal = self.normal(site)
        if normal is None:
            raise UnsupportedError("the adapters of this weight have no form beside codes", site.path, "merge them")
        return site.stored(normal.merged(codes))

    def reference(self, how: Mapping[str, str]) -> Graph:
        """The plain graph with those weights: weight → "side", "whole", or anything else for codes alone."""
        chosen = [site for site in self.sites if site.weight in how]
        values = {site.weight: functools.partial(self.weight, site, how[site.weight]) for site in chosen}
        kept = {name: read for name, read in self.plain.inserted.items() if name not in values}
        return dataclasses.replace(self.plain, values=Overlay(self.plain.values, values), inserted=kept)


def merged(graph: Graph) -> Graph:
    """The graph with its adapters merged, its codes decoded, and a head whose weight is its own."""
    return untied(finalise(graph if folds(graph) else decoded(graph)))


def adapted(graph: Graph, step: IntQ | None) -> Graph:
    """An adapter as it stands in the slots of an export, for torch.

    What it computes of the base (the norms of a DoRA, the keys of a prompt) it computes of the base that it was trained
    over, as in `surgeon.lower.onnx.adapter_slots.compiled`: one file fits the export of every precision.

    Args:
        graph: the base with its adapters, with values.
        step: what made the export's codes of the base; None where they are its own, or none.
    """
    if step is None:
        return graph
    kept = as_columns(finalise(graph, lambda kept: kept))
    heads = whole.linears(kept)
    found = Effective(kept, whole.settled(merged(kept), heads), step)
    beside = {**dict.fromkeys(found.groups, SIDE), **dict.fromkeys(heads, WHOLE)}
    return found.reference({site.weight: beside.get(site.weight, "quantise") for site in found.sites})
