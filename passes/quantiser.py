"""What the passes that hold weights in codes share: their sites, and how a linear changes into one that dequantises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError
from surgeon.passes.base import CONV1D, EXPERTS, LINEAR, Cost, Pass, Skip

if TYPE_CHECKING:
    import torch

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.hold import Part
    from surgeon.sites import Site


@dataclass(frozen=True)
class Quantiser(Pass):
    """A pass that holds the weights of linears in codes. What it computes differs from the base by their rounding.

    Adapters over it see the dequantised weight, in the graph and in the normal form. Nothing is quantised before its
    value is asked for, and then one weight at a time.

    Options:
        targets: which modules, see `surgeon.select`; all-linear leaves out the output head.
        exclude: modules that are left out even if targeted.
    """

    keeps: ClassVar[str] = "changes"
    stacks: ClassVar[bool] = False
    offered: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 0.0
    hint_twice: ClassVar[str] = "the base is in codes: name the adapter alone, --method lora or qalora"
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D)
    targets: str = "all-linear"
    exclude: str = ""

    @property
    def derived(self) -> bool:
        """Codes follow from the weights."""
        return True

    def unfit(self, site: Site) -> str:
        """Why this site cannot be quantised, or ""."""
        return ""

    def shapes(self, out: int, inp: int) -> list[tuple[str, tuple[int, ...], torch.dtype | None]]:
        """Name, shape and dtype of the tensors that stand for a weight `[out, in]`, in the order of the operator.

        No dtype is that of the arithmetic.
        """
        raise UsageError(f"{self.name} has no parts", "")

    def parts(self, site: Site) -> list[Part]:
        """The tensors that stand for the weight of a site."""
        from surgeon.hold import Part

        return [Part(*entry) for entry in self.shapes(site.out, site.inp)]

    def encode(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """A weight `[out, in]` as its parts, by name."""
        raise UsageError(f"{self.name} does not quantise", "")

    def decode(self, parts: dict[str, torch.Tensor], site: Site) -> torch.Tensor:
        """The parts as the weight `[out, in]` that they stand for, in fp32 or wider."""
        raise UsageError(f"{self.name} does not dequantise", site.path)

    def operator(self, site: Site) -> tuple[Any, dict[str, Any]]:
        """The linear that dequantises, and its keywords."""
        raise UsageError(f"{self.name} has no operator", site.path)

    def match(self, graph: Graph) -> list[Site | Skip]:
        """The targeted sites; raises UsageError for a pattern that matches nothing that can be quantised."""
        from surgeon.sites import sites
        from surgeon.targets import targeted, unnamed_experts

        shared, whole = _shared(graph), f"{self.name} quantises linears alone, and not experts"
        chosen: list[Site | Skip] = []
        for site in targeted(graph, sites(graph, *self.kinds, EXPERTS), self.targets, self.exclude):
            why = whole if site.kind == EXPERTS else _taken(graph, site, shared) or self.unfit(site)
            chosen.append(Skip(site.path, why) if why else site)
        chosen += [Skip(site.path, whole) for site in unnamed_experts(graph, self.targets, self.exclude)]
        if not any(not isinstance(item, Skip) for item in chosen):
            reasons = "; ".join(f"{item.path}: {item.why}" for item in chosen[:3] if isinstance(item, Skip))
            raise UsageError(f"{self.name} has no weight to quantise", reasons or self.targets, "other --targets")
        return chosen

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x Wᵀ + bias → the operator on x, bias and the parts of W."""
        from surgeon.hold import hold

        function, options = self.operator(site)
        hold(
            edit,
            function,
            self.parts(site),
            self._codes(edit.graph),
            functools.partial(_decoded, self, site),
            **options,
        )

    def _codes(self, graph: Graph) -> Callable[[str, str], torch.Tensor]:
        """The codes of any weight of a graph, shared by all its sites, so that one weight is in memory at a time."""
        from surgeon.coded import stored_parts
        from surgeon.hold import Codes

        by_weight = {site.weight: site for site in self._sites(graph)}

        def make(name: str) -> dict[str, torch.Tensor]:
            stored = stored_parts(graph, name)
            return self.encode(by_weight[name].matrix(graph.values[name])) if stored is None else stored

        return Codes(make)

    def _sites(self, graph: Graph) -> list[Site]:
        from surgeon.sites import sites

        return sites(graph, *self.kinds)

    def cost(self, site: Site) -> Cost:
        """No parameters; bytes of codes in the place of a weight."""
        import math

        import torch

        from surgeon.forms import writer_of

        parts = self.parts(site)
        held = sum(math.prod(part.shape) * (part.dtype or torch.float32).itemsize for part in parts)
        saved = writer_of(self, torch.float32).nbytes(site.out, site.inp)
        return Cost(freed=site.inp * site.out, held=held, saved=saved)


def _decoded(step: Quantiser, site: Site, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return site.stored(step.decode(parts, site))


def _shared(graph: Graph) -> set[str]:
    """Weights that several modules read."""
    from surgeon.sites import sites

    readers: dict[str, set[str]] = {}
    for site in sites(graph):
        readers.setdefault(site.weight, set()).add(site.path)
    return {name for name, paths in readers.items() if len(paths) > 1}


def _taken(graph: Graph, site: Site, shared: set[str]) -> str:
    spec = graph.tensors[site.weight]
    if spec.held is not None:
        return f"already quantised by {spec.held.owner}"
    if site.weight in shared:
        return f"{site.weight} is read by other modules too"
    return "its weight trains" if spec.trainable else ""
