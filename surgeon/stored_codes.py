"""How quantised weights lie in a checkpoint: bitsandbytes' form for 4-bit books, surgeon's own for integers.

surgeon's own: for a weight `w` the tensors `w.codes` uint8, `w.scale` and `w.zero` (see `surgeon.numerics_int`), and in
config.json `quantization_config` = `{"quant_method": "surgeon", "bits": N, "modules": [paths]}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from surgeon.bitsandbytes_state import to_state
from surgeon.errors import UsageError
from surgeon.graph import Graph, Holding
from surgeon.numerics import FourBit, Nested, code_book, dynamic_map
from surgeon.passes.intq import IntQ
from surgeon.passes.nf4 import Nf4
from surgeon.safetensors_file import NAMES

METHOD = "surgeon"
JSON_BYTES = 256
"""Room for a quant_state, so that a file's size is known before its weights are quantised."""


@dataclass(frozen=True)
class Saved:
    """The held weights of a graph in the form they are saved in."""

    graph: Graph
    step: Nf4 | IntQ

    def config(self, names: list[str]) -> dict[str, Any]:
        """`quantization_config` of config.json, for these weights."""
        if isinstance(self.step, IntQ):
            paths = [name.removesuffix(".weight") for name in names]
            return {"quant_method": METHOD, "bits": self.step.bits, "modules": paths}
        quantised = {name.removesuffix(".weight") for name in names}
        others = _linears(self.graph) - quantised
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": self.step.kind,
            "bnb_4bit_use_double_quant": self.step.double,
            "bnb_4bit_compute_dtype": str(_dtype(self.graph)).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(others) or None,
        }

    def layouts(self, stored: str, name: str) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors of a weight, without reading it."""
        holding = self._holding(name)
        shapes = {part: self.graph.tensors[full].shape for part, full in holding.parts.items()}
        if isinstance(self.step, IntQ):
            dtypes = {"codes": torch.uint8, "scale": torch.float32, "zero": torch.float32}
            return [(f"{stored}.{part}", dtypes[part], shape) for part, shape in shapes.items()]
        made = [
            (stored, torch.uint8, (*shapes["codes"], 1)),
            (f"{stored}.absmax", torch.uint8 if self.step.double else torch.float32, shapes["absmax"]),
            (f"{stored}.quant_map", torch.float32, tuple(code_book(self.step.kind).shape)),
            (f"{stored}.quant_state.bitsandbytes__{self.step.kind}", torch.uint8, (JSON_BYTES,)),
        ]
        if self.step.double:
            made.append((f"{stored}.nested_absmax", torch.float32, shapes["scale"]))
            made.append((f"{stored}.nested_quant_map", torch.float32, tuple(dynamic_map().shape)))
        return made

    def tensors(self, stored: str, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a weight."""
        holding = self._holding(name)
        parts = {part: self.graph.inserted[full]() for part, full in holding.parts.items()}
        if isinstance(self.step, IntQ):
            return {f"{stored}.{part}": t.float() if t.is_floating_point() else t for part, t in parts.items()}
        nested = Nested(parts["scale"], parts["offset"]) if self.step.double else None
        shape = self._matrix_shape(name)
        packed = FourBit(parts["codes"], parts["absmax"], shape, self.step.kind, nested)
        return to_state(stored, packed, _dtype(self.graph), JSON_BYTES)

    def _matrix_shape(self, name: str) -> tuple[int, ...]:
        from surgeon.sites import sites

        site = next(site for site in sites(self.graph) if site.weight == name)
        return site.out, site.inp

    def _holding(self, name: str) -> Holding:
        holding = self.graph.tensors[name].held
        assert holding is not None
        return holding


def of_graph(graph: Graph) -> Saved:
    """The one quantiser of a graph; raises UsageError if there is none, or if something else is applied."""
    steps = [step for step in graph.applied if isinstance(step, (Nf4, IntQ))]
    if len(steps) != 1:
        what = "nothing is quantised" if not steps else "weights are quantised in two ways"
        raise UsageError(what, graph.source, "apply one of nf4, intq")
    others = [step.name for step in graph.applied if step is not steps[0]]
    if others:
        raise UsageError(f"{', '.join(others)} is applied too", graph.source, "merge it first: surgeon merge")
    return Saved(graph, steps[0])


def _linears(graph: Graph) -> set[str]:
    from surgeon.sites import CONV1D, LINEAR, sites

    return {site.path for site in sites(graph, LINEAR, CONV1D)}


def _dtype(graph: Graph) -> torch.dtype:
    """The dtype that the weights had."""
    found = getattr(graph.config, "dtype", None)
    return found if found in NAMES else torch.float32
