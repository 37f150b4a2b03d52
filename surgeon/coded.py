"""Checkpoints that were saved quantised: their weights as codes, and as what the codes decode to.

Read is every form of `surgeon.forms`: bitsandbytes in 4 bits, GPTQ, AWQ, compressed-tensors' packed integers,
and surgeon's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from surgeon.checkpoint import Checkpoint
from surgeon.errors import UnsupportedError, UsageError
from surgeon.forms import READERS, Codes, Reader
from surgeon.forms.base import AGAIN
from surgeon.graph import Graph
from surgeon.numerics import FourBit, dequantise_4bit
from surgeon.numerics_int import Groups, dequantise_groups
from surgeon.safetensors_file import TensorInfo


class CodedCheckpoint(Checkpoint):
    """A quantised checkpoint seen as the one it was made from: every coded weight has its own name, shape and dtype.

    Attributes:
        raw: the checkpoint as it is stored.
        step: the pass that stands for the quantisation, its targets the modules that are in codes.
        coded: stored name of a weight → names of the tensors it is made of.
    """

    def __init__(self, raw: Checkpoint, find: Reader) -> None:
        config = {key: value for key, value in raw.config.items() if key != "quantization_config"}
        super().__init__(raw.folder, config, raw.shards)
        self.raw, self.form = raw, find
        self._transposed: set[str] = set()
        self.coded = find.weights(raw)
        if not self.coded:
            raise UsageError("config.json says that the weights are quantised, and none is", str(raw.folder), AGAIN)
        first = self.codes_of(next(iter(self.coded)))
        self.step = find.step(first, [name.removesuffix(".weight") for name in self.coded])
        parts = {part for names in self.coded.values() for part in names}
        infos = {name: info for name, info in raw.tensors.items() if name not in parts or name in self.coded}
        self.tensors = infos | {name: self._info(name) for name in self.coded}

    def codes_of(self, name: str) -> Codes:
        """The codes of a coded weight."""
        tensors = {part: self.raw.read(part) for part in self.coded[name]}
        return self.form.read(name, tensors, str(self.folder))

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor, or what the codes of a weight decode to, in the dtype it had."""
        if name not in self.coded:
            return super().read(name)
        codes = self.codes_of(name)
        dtype = self.tensors[name].dtype
        found = dequantise_4bit(codes, dtype) if isinstance(codes, FourBit) else dequantise_groups(codes, dtype)
        return found.t() if name in self._transposed else found

    def transpose(self, paths: Collection[str]) -> None:
        """Say which modules store their weights input first (Conv1D); codes are `[out, in]` in every form."""
        stems = [f".{path}.weight" for path in paths]
        turned = {name for name in self.coded if any(stem.endswith(f".{name}") for stem in stems)} - self._transposed
        infos = {name: replace(self.tensors[name], shape=self.tensors[name].shape[::-1]) for name in turned}
        self._transposed |= turned
        self.tensors = {**self.tensors, **infos}

    def release(self) -> None:
        """Give the mapped pages back."""
        super().release()
        self.raw.release()

    def fingerprint(self) -> str:
        """That of the files."""
        return self.raw.fingerprint()

    def _info(self, name: str) -> TensorInfo:
        stored = self.raw.tensors[self.coded[name][0]]
        shape, dtype = self.form.shape(name, self.raw, self.coded[name])
        return replace(stored, name=name, shape=shape, dtype=dtype)


def is_coded(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint says that it was saved quantised."""
    return bool(checkpoint.config.get("quantization_config"))


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """A quantised checkpoint seen as the one it was made from; any other as it is.

    Raises:
        UnsupportedError: it was quantised by a method that is not read.
        UsageError: its tensors do not fit one another.
    """
    config = checkpoint.config.get("quantization_config") or {}
    method = str(config.get("quant_method", ""))
    if not config or not checkpoint.shards:
        return checkpoint
    if method not in READERS or (method == "bitsandbytes" and not config.get("load_in_4bit")):
        what = f"the checkpoint is quantised ({method}{', 8 bits' if method == 'bitsandbytes' else ''})"
        hint = f"read are {', '.join(READERS)} (bitsandbytes in 4 bits); or use the checkpoint it was quantised from"
        raise UnsupportedError(what, str(checkpoint.folder), hint)
    named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    return CodedCheckpoint(checkpoint, READERS[method](config, getattr(torch, named, torch.float32)))


def parts_of(codes: Codes) -> dict[str, torch.Tensor]:
    """Codes as the tensors a graph holds them in (`Quantiser.parts`)."""
    if isinstance(codes, Groups):
        return {"codes": codes.codes, "scale": codes.scale, "zero": codes.zero}
    found = {"codes": codes.codes, "absmax": codes.absmax}
    return found if codes.nested is None else found | {"scale": codes.nested.scale, "offset": codes.nested.offset}


def with_codes(graph: Graph) -> Graph:
    """The graph of a quantised checkpoint with the codes it stores; any other as it is."""
    weights = getattr(graph.values, "weights", None)
    checkpoint = getattr(weights, "checkpoint", None)
    if weights is None or not isinstance(checkpoint, CodedCheckpoint):
        return graph
    from surgeon.run import apply
    from surgeon.sites import CONV1D, LINEAR, sites

    found = sites(graph, LINEAR, CONV1D)
    paths = [site.path for site in found if weights.direct(site.weight) in checkpoint.coded]
    left = len(checkpoint.coded) - len(paths)
    if left or not paths:
        what = f"{left} of {len(checkpoint.coded)} quantised tensors are no weight of a linear"
        raise UnsupportedError(what, str(checkpoint.folder), "use the checkpoint it was quantised from")
    return apply(graph, replace(checkpoint.step, targets=",".join(paths)))


def stored_parts(graph: Graph, name: str) -> dict[str, torch.Tensor] | None:
    """The codes of a weight as its checkpoint stores them, None if it does not."""
    weights = getattr(graph.values, "weights", None)
    checkpoint = getattr(weights, "checkpoint", None)
    if weights is None or not isinstance(checkpoint, CodedCheckpoint):
        return None
    stored = weights.direct(name)
    return parts_of(checkpoint.codes_of(stored)) if stored in checkpoint.coded else None


def stored_infos(values: Mapping[str, torch.Tensor], name: str) -> dict[str, TensorInfo]:
    """The parts of a weight (`Quantiser.parts`) that a checkpoint stores in the same bytes or values, and where."""
    weights = getattr(values, "weights", None)
    checkpoint = getattr(weights, "checkpoint", None)
    if weights is None or not isinstance(checkpoint, CodedCheckpoint):
        return {}
    stored = weights.direct(name)
    if stored not in checkpoint.coded:
        return {}
    found = checkpoint.form.direct(stored)
    return {part: checkpoint.raw.tensors[other] for part, other in found.items() if other in checkpoint.raw.tensors}
