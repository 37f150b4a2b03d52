"""The held weights of a graph in the form that they are saved in, and what that form cannot hold of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from surgeon.errors import CheckFailed, UnsupportedError, UsageError
from surgeon.forms import Layout, Writer, writer_of
from surgeon.graph import Graph
from surgeon.passes.quantiser import Quantiser
from surgeon.safetensors_file import NAMES
from surgeon.sites import CONV1D, LINEAR, Site, sites
from surgeon.verification import Probe, outputs


class Saved:
    """The held weights of a graph in the form that they are saved in.

    Args:
        graph: a graph with one quantiser, and no adapter.
        form: one of `surgeon.forms`, "" for the quantiser's default.

    Raises:
        UsageError: nothing is quantised, something else is applied, or there is no such form.
        UnsupportedError: the form has no place for a weight.
    """

    def __init__(self, graph: Graph, form: str = "") -> None:
        self.graph, self.step = graph, _one_quantiser(graph)
        self.writer: Writer = writer_of(self.step, dtype_of(graph), form)
        self.sites: dict[str, Site] = {s.weight: s for s in sites(graph, LINEAR, CONV1D)}
        for name in self.names:
            site = self.sites[name]
            if why := self.writer.unfit(site.out, site.inp, site.transposed):
                hint = "leave it out with --exclude, or another --format (surgeon holds every shape)"
                raise UnsupportedError(f"it does not fit the form {self.writer.name}: {why}", site.path, hint)

    @property
    def names(self) -> list[str]:
        """The weights that are held in codes."""
        return [name for name, spec in self.graph.tensors.items() if spec.held is not None]

    def config(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        paths = [name.removesuffix(".weight") for name in self.names]
        return self.writer.config(paths, sorted({site.path for site in self.sites.values()} - set(paths)))

    def layouts(self, stored: str, name: str) -> list[Layout]:
        """Name, dtype and shape of the tensors of a weight, without reading it."""
        return self.writer.layouts(stored, self.sites[name].out, self.sites[name].inp)

    def nbytes(self, name: str) -> int:
        """Bytes of the tensors of a weight in the file."""
        return self.writer.nbytes(self.sites[name].out, self.sites[name].inp)

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors that stand for a weight in the graph."""
        holding = self.graph.tensors[name].held
        assert holding is not None
        return {part: self.graph.inserted[full]() for part, full in holding.parts.items()}

    def tensors(self, stored: str, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a weight in the file."""
        site, parts = self.sites[name], self.parts(name)
        if count := self.writer.misfits(parts):
            what = f"{count:,} of its {parts['zero'].numel():,} zero points do not fit the form {self.writer.name}"
            hint = "--format gptq_v2, which has a place for 0, or surgeon, which has one for every value"
            raise UnsupportedError(what, name, hint)
        return self.writer.tensors(stored, parts, site.out, site.inp)


def _one_quantiser(graph: Graph) -> Quantiser:
    steps = [step for step in graph.applied if isinstance(step, Quantiser)]
    if len(steps) != 1:
        what = "nothing is quantised" if not steps else "weights are quantised in two ways"
        raise UsageError(what, graph.source, "apply one of nf4, intq")
    others = [step.name for step in graph.applied if step is not steps[0]]
    if others:
        raise UsageError(f"{', '.join(others)} is applied too", graph.source, "merge it first: surgeon merge")
    return steps[0]


def dtype_of(graph: Graph) -> torch.dtype:
    """The dtype that the weights of a base have."""
    found = getattr(graph.config, "dtype", None)
    return found if found in NAMES else torch.float32


def fitted(graph: Graph, saved: Saved) -> Graph:
    """The graph with the codes as the form holds them: scales in its dtype, zero points among its integers."""
    result = graph.copy()
    for name in saved.names:
        held = graph.tensors[name].held
        assert held is not None
        for part, full in held.parts.items():
            result.inserted[full] = functools.partial(_rounded, saved, name, part)
    return result


def _rounded(saved: Saved, name: str, part: str) -> torch.Tensor:
    return saved.writer.rounded(saved.parts(name))[part]


@dataclasses.dataclass(frozen=True)
class Misfit:
    """What a form cannot hold of a graph.

    Attributes:
        form: its name.
        zeros: zero points that are not among its integers.
        of: of how many.
        worst: the weight with most of them.
        error: ‖rounded − exact‖ / ‖exact‖ of the outputs on probes, if they are rounded.
    """

    form: str
    zeros: int
    of: int
    worst: str
    error: float

    def refuse(self, where: str) -> None:
        """Raise CheckFailed."""
        raise CheckFailed(
            f"{self.zeros:,} of {self.of:,} zero points do not fit the form {self.form}, which holds integers only "
            f"(most at {self.worst}). Rounded to them the outputs change by {self.error:.2%}",
            where,
            "--format surgeon holds them as they are; or --accept-error. Nothing was written",
        )


def misfit(
    graph: Graph, saved: Saved, probes: Sequence[Probe], release: Callable[[], None] = lambda: None
) -> Misfit | None:
    """What the form of `saved` cannot hold of its graph, measured; None if every zero point has its place."""
    wrong: dict[str, int] = {}
    total = 0
    for name in saved.names:
        parts = saved.parts(name)
        wrong[name] = saved.writer.misfits(parts)
        total += parts["zero"].numel() if "zero" in parts else 0
    if not sum(wrong.values()):
        return None
    error = relative_error(outputs(graph, probes, release), outputs(fitted(graph, saved), probes, release))
    return Misfit(saved.writer.name, sum(wrong.values()), total, max(wrong, key=lambda name: wrong[name]), error)


def relative_error(expected: Sequence[Sequence[torch.Tensor]], found: Sequence[Sequence[torch.Tensor]]) -> float:
    """‖found − expected‖ / ‖expected‖ over all outputs of all probes."""
    pairs = [pair for e, f in zip(expected, found, strict=True) for pair in zip(e, f, strict=True)]
    wrong = sum(float((f - e).square().sum()) for e, f in pairs) ** 0.5
    return wrong / max(sum(float(e.square().sum()) for e, _ in pairs) ** 0.5, 1e-30)
