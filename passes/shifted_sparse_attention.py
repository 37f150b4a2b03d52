"""Shifted sparse attention: softmax(q kᵀ) v within segments while training (Chen et al. 2024, LongLoRA, §3.2)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from surgeon.errors import UnsupportedError, UsageError
from surgeon.passes.base import ATTENTION, Cost, Pass, Skip

if TYPE_CHECKING:
    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.sites import Site


@dataclass(frozen=True)
class ShiftedSparseAttention(Pass):
    """Every attention over the model's own tokens sees only its segment while it trains, and everything otherwise.

    Half of the heads have segments of `group` tokens; those of the other half are shifted by half a segment.
    Evaluation, generation, merge and export use whole attention. `surgeon.segments` holds the arithmetic. The paper
    turns the text, by which the first tokens of half of the heads see the last ones; here they do not, unless `wrap`
    asks for it.

    Options:
        group: tokens of a segment; 0 for a quarter of the context.
        wrap: the paper's form, in which the first half-segment sees the last.
    """

    name: ClassVar[str] = "shifted_sparse_attention"
    keeps: ClassVar[str] = "exact"
    stacks: ClassVar[bool] = False
    offered: ClassVar[bool] = True
    training_only: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (ATTENTION,)
    group: int = 0
    wrap: bool = False

    def __post_init__(self) -> None:
        if self.group < 0 or self.group == 1:
            what = f"{self.name}: group is {self.group}"
            raise UsageError(what, "--group", "at least 2 tokens, for example 512, or 0 for a quarter of the context")

    def fitted(self, graph: Graph) -> ShiftedSparseAttention:
        """With a quarter of the context as group, where none is given.

        Raises:
            UsageError: the model has no number of positions to take a quarter of.
        """
        from surgeon import context

        if self.group:
            return self
        reach = graph.context or context.limit(graph.config)
        if reach < 8:
            what = f"{self.name}: {graph.config.model_type} has no limit of positions to take a quarter of"
            raise UsageError(what, "--group", "name the length of a segment, for example --group 2048")
        return dataclasses.replace(self, group=reach // 4)

    def requires(self, graph: Graph) -> None:
        """Raise for a model without attention nodes."""
        from surgeon.run import require_node

        require_node(graph, ATTENTION, self.name)

    def match(self, graph: Graph) -> list[Site | Skip]:
        """Attentions over the model's own tokens that are not cut into chunks already.

        Raises:
            UnsupportedError: there is none.
        """
        from surgeon.sites import sites

        parts = {**graph.layers, "": graph.trunk}
        chunks = {
            (id(part), node.name): int(node.kwargs.get("chunk") or 0)
            for part in parts.values()
            for node in part.nodes
            if node.op == "call_function"
        }
        found: list[Site | Skip] = []
        for site in sites(graph, ATTENTION):
            chunk = chunks[id(parts[site.layer]), site.node]
            why = f"sees chunks of {chunk} tokens already" if chunk else ""
            why = "reads the states of an encoder" if site.role == "cross" else why
            found.append(Skip(site.path, why) if why else site)
        if all(isinstance(item, Skip) for item in found):
            what = f"{self.name}: no attention of {graph.config.model_type} sees its whole text"
            raise UnsupportedError(what, graph.source or graph.config.model_type, "train it as it is")
        return found

    def cost(self, site: Site) -> Cost:
        """Nothing is added, and a token sees its segment."""
        return Cost(span=self.group)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """attention(…) → attention(…, group=G)."""
        edit.raise_by("group", self.group)
        if self.wrap:
            edit.raise_by("wrap", 1)
