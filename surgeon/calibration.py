"""Weights quantised on samples: one linear after another, each on the inputs that those before it leave it.

A graph runs node by node on all samples at once (`surgeon.stream`). At a linear that is to be quantised the inputs give
its Hessian (`surgeon.gptq`), its weight becomes codes, and what runs on is what the codes compute: so later linears,
those of the same layer among them, see the errors of earlier ones (Frantar et al. 2023; "true sequential").

In memory are one weight with its Hessian, and the activations of all samples: samples · length · hidden · 4 bytes for
each one that is still to be read. Codes are kept in a file until they are asked for.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from surgeon.errors import SurgeonError, UsageError
from surgeon.eva import batches, inputs_of, rows_of
from surgeon.fold import value_of
from surgeon.gptq import Hessian
from surgeon.graph import Graph
from surgeon.sites import Site, aten, input_position
from surgeon.stream import StreamingExecutor

if TYPE_CHECKING:
    from surgeon.passes.intq import IntQ

STORED = "stored"
"""The `calibration` of a pass whose codes are made: a work folder keeps them, and does not need the file again."""
FIRST = ".calibrated"
"""Behind the name of a part: its value, between `prepare` and `initialise`."""


class Spill:
    """Tensors in files of a folder that goes when this does."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="surgeon-codes-"))
        self._end = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._count = 0

    def put(self, tensors: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
        """Write tensors away; what reads each one again."""
        self._count += 1
        file = self.folder / f"{self._count}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        return {name: functools.partial(self._read, file, name) for name in tensors}

    def _read(self, file: Path, name: str) -> Tensor:
        with safe_open(file, "pt") as opened:
            found: Tensor = opened.get_tensor(name)
            return found


class _Calibrator(StreamingExecutor):
    """Runs a graph whose chosen linears are quantised as they are reached."""

    def __init__(self, graph: Graph, step: IntQ, chosen: list[Site], masks: list[Tensor]) -> None:
        checkpoint = getattr(getattr(graph.values, "weights", None), "checkpoint", None)
        super().__init__(graph, release=getattr(checkpoint, "release", lambda: None))
        prefixes = {site: f"{site.layer}." if site.layer else "" for site in chosen}
        self._at = {(prefixes[site], site.node): site for site in chosen}
        self._pass, self._masks, self._spill = step, masks, Spill()
        self._factor: tuple[Any, Tensor] | None = None
        self.codes: dict[str, dict[str, Callable[[], Tensor]]] = {}

    def _step(self, node: fx.Node, values: list[dict[fx.Node, Any]], prefix: str) -> list[Any]:
        site = self._at.get((prefix, node.name))
        if site is None:
            return super()._step(node, values, prefix)
        source: Any = node.args[input_position(node)]
        lanes = [lane[source] for lane in values]
        try:
            factor = self._factor_of((prefix, source), lanes)
            parts = self._pass.calibrated(site.matrix(value_of(self.graph, site.weight)), factor)
        except SurgeonError as error:
            raise type(error)(error.what, error.where or site.weight, error.hint) from error
        self.codes[site.path] = self._spill.put(parts)
        weight = self._pass.decode(parts, site).to(self.dtype)
        position = 0 if node.target is aten.addmm.default else 2
        bias: Any = node.args[position] if len(node.args) > position else None
        added = None if bias is None else self._read(bias, prefix)
        self.release()
        return [torch.nn.functional.linear(x, weight, added) for x in lanes]

    def _factor_of(self, key: tuple[str, fx.Node], lanes: list[Tensor]) -> Tensor:
        """U of the inputs; linears that read the same ones (q, k, v) share it."""
        if self._factor is None or self._factor[0] != key:
            self._factor = None
            gathered = Hessian(lanes[0].shape[-1])
            for x, mask in zip(lanes, self._masks, strict=True):
                gathered.add(rows_of(x, mask))
            self._factor = (key, gathered.factor(self._pass.damping))
        return self._factor[1]


def calibrate(graph: Graph, step: IntQ, chosen: list[Site]) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """The codes of linears, by path and part, on the samples of the pass's file.

    Raises:
        UsageError: the file cannot be read, the model has no tokenizer, or a weight or its inputs are not finite.
    """
    lanes, masks = [], []
    for batch in batches(graph, Path(step.calibration), 1, step.length):
        lanes.append(inputs_of(graph, batch))
        masks.append(batch["attention_mask"])
        if len(lanes) == step.samples:
            break
    run = _Calibrator(graph, step, chosen, masks)
    run.batch(lanes)
    if missing := [site.path for site in chosen if site.path not in run.codes]:
        raise UsageError("the calibration does not reach every module", missing[0], "leave it out with --exclude")
    return run.codes


def prepare(graph: Graph, step: IntQ, owner: str, chosen: list[Site]) -> None:
    """Calibrate, and put the codes beside the graph for `place`."""
    for path, parts in calibrate(graph, step, chosen).items():
        site = next(site for site in chosen if site.path == path)
        for part, read in parts.items():
            graph.inserted[site.tensor(owner, part) + FIRST] = read


def place(graph: Graph) -> None:
    """The codes that `prepare` has made in their places; without them (a work folder that is read) nothing."""
    for name in [name for name in graph.inserted if name.endswith(FIRST)]:
        graph.inserted[name.removesuffix(FIRST)] = graph.inserted.pop(name)
