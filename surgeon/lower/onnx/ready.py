"""What is lowered to ONNX, decided before anything is built: which adapters, integers and attention a model gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from surgeon import run
from surgeon.errors import UnsupportedError
from surgeon.finalise import finalise
from surgeon.graph import Graph
from surgeon.lower.onnx import adapters as apart
from surgeon.lower.onnx import attention as own
from surgeon.lower.onnx import genai, gqa, seq2seq
from surgeon.lower.onnx import once as run_once
from surgeon.lower.onnx.adapter_slots import base_of
from surgeon.lower.onnx.codes import with_codes
from surgeon.lower.onnx.effective import adapted
from surgeon.lower.onnx.precision import ACTIVATIONS, BITS, Quantised, quantised
from surgeon.lower.onnx.profiles import FUSED, GQA, STANDARD, Profile
from surgeon.lower.onnx.slots import named
from surgeon.lower.virtual_columns import as_columns
from surgeon.passes import make
from surgeon.passes.base import Adapter
from surgeon.passes.quantiser import Quantiser

Paths = dict[str, list[str]]
MODEL = "model"
"""What a model is called that is the only one."""


@dataclass(frozen=True)
class Ready:
    """A model that can be built.

    Attributes:
        plain: without cache and slots: what is computed.
        parts: what is lowered, by the names of its files: one model, or an encoder and a decoder.
        profile: what it is made for, its attention as asked.
        attention: what computes it, "gqa", "fused" or "standard"; in the layers of `fallbacks` it is standard.
        fallbacks: why not what the profile has: reason → paths of the layers.
        chosen: of int8 and int4, what became of each linear.
        record: the manifest of slots, empty where adapters are no inputs.
        below: what is exported, before anything of it is folded or rounded: the graph, or its base where adapters are
            inputs.
        rotary: what computes rotary embeddings beside a fused attention: operator → paths of the layers.
    """

    plain: Graph
    parts: Mapping[str, Graph]
    profile: Profile
    attention: str
    fallbacks: Mapping[str, list[str]]
    chosen: Quantised | None
    record: dict[str, Any]
    below: Graph
    rotary: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def final(self) -> Graph:
        """The one model, or the decoder."""
        return list(self.parts.values())[-1]

    @property
    def once(self) -> bool:
        """Whether it is run once, without a cache."""
        return self.plain.task in run_once.TASKS

    @property
    def reference(self) -> Graph:
        """What ONNX Runtime is compared with."""
        return self.plain if self.chosen is None else _supported(self.chosen.reference)

    @property
    def relative(self) -> float | None:
        """What ONNX Runtime may be off by, of the largest logit, where that is more than its dtype makes it."""
        return None if self.chosen is None else ACTIVATIONS

    @property
    def exact(self) -> Graph:
        """What is computed, before any rounding."""
        return exportable(self.below, codes=False)

    def reference_of(self, adapter: Graph) -> Graph:
        """What ONNX Runtime is compared with when an adapter is in the slots: the graph of that adapter."""
        return adapted(adapter, self.chosen.step if self.chosen else None)


def ready(
    graph: Graph, profile: Profile, dtype: torch.dtype, precision: str, codes: bool, four_bit: str,
    adapters: str, targets: str,
) -> Ready:  # fmt: skip
    """Decide; the arguments are those of `surgeon.lower.onnx.export.export_onnx`.

    Raises:
        UnsupportedError: a part of the model has no place in the export.
    """
    _require_supported(graph)
    swapped = adapters != apart.MERGE
    below = base_of(graph) if swapped else graph
    chosen = quantised(below, precision, four_bit) if precision in BITS else None
    plain = exportable(below, codes) if chosen is None else _supported(chosen.graph)
    if profile.package == "genai":
        genai.check(plain)
    parts, attention, fallbacks, turned = _parts(
        plain, profile, lambda made_for: apart.slotted(plain, made_for, targets, adapters) if swapped else plain
    )
    record = apart.manifest(parts, below, profile, dtype) if swapped else {}
    if chosen is not None:
        chosen = chosen.beside({name.rpartition(".")[0] for part in parts.values() for name in named(part)})
    return Ready(plain, parts, profile, attention, fallbacks, chosen, record, below, turned)


def _parts(
    plain: Graph, profile: Profile, slotted: Callable[[Profile], Graph]
) -> tuple[dict[str, Graph], str, Paths, Paths]:
    """What is lowered, the kind of its attention, why that is not the profile's, and what computes rotations."""
    whole, both = slotted(profile), plain.task == seq2seq.TASK
    once = plain.task in run_once.TASKS
    if both:
        parts = seq2seq.parts(whole)
    else:
        parts = {MODEL: run_once.numbered(whole) if once else run.apply(whole, make("kv_cache"))}
    if profile.attention == FUSED:
        return _with_operators(parts)
    if both or once or profile.attention != GQA:
        return parts, STANDARD, seq2seq.fallbacks(plain) if both and profile.attention == GQA else {}, {}
    fused = gqa.fuse(parts[MODEL], preloaded=whole is not plain)
    reasons, rotary = ({why: list(paths) for why, paths in said.items()} for said in (fused.reasons, fused.rotary))
    if fused.fused:
        return {MODEL: fused.graph}, GQA, reasons, rotary
    if whole is not plain:
        parts = {MODEL: run.apply(slotted(replace(profile, attention=STANDARD)), make("kv_cache"))}
    return parts, STANDARD, reasons, rotary


def _with_operators(parts: Mapping[str, Graph]) -> tuple[dict[str, Graph], str, Paths, Paths]:
    """With ONNX's own operators where they compute what the graphs do."""
    made = {name: own.fuse(part) for name, part in parts.items()}
    reasons, rotary = Paths(), Paths()
    for found in made.values():
        for known, said in ((reasons, found.reasons), (rotary, found.rotary)):
            for name, paths in said.items():
                known[name] = [*known.get(name, ()), *paths]
    kind = FUSED if any(found.any for found in made.values()) else STANDARD
    return {name: found.graph for name, found in made.items()}, kind, reasons, rotary


def exportable(graph: Graph, codes: bool = True) -> Graph:
    """The graph with its adapters folded in; a prompt of a language model is keys and values at its attentions.

    With `codes` weights stay in codes (see `surgeon.lower.onnx.codes.with_codes`).

    Raises:
        UnsupportedError: it has no inputs of text, or something stays that has no place in the export.
    """
    _require_supported(graph)
    return _supported(with_codes(graph) if codes else finalise(graph))


def _require_supported(graph: Graph) -> None:
    both = "decoder_input_ids" in graph.inputs
    if graph.task not in ("causal-lm", seq2seq.TASK, *run_once.TASKS) or both != (graph.task == seq2seq.TASK):
        name = graph.config.model_type
        raise UnsupportedError(
            f"the ONNX export is for language models, encoder-decoders, classifiers and encoders; {name} is read for "
            f"{graph.task}",
            graph.source,
            "--target hf writes a merged checkpoint of any model",
        )


def _supported(graph: Graph) -> Graph:
    plain = as_columns(graph) if graph.task == "causal-lm" else graph
    left = ", ".join(step.name for step in plain.applied if not isinstance(step, (Adapter, Quantiser)))
    if left:
        raise UnsupportedError(f"the ONNX export has no place for {left}", graph.source, "export without it")
    return plain
