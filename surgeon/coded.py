"""Checkpoints that were saved quantised: their weights as codes, and as what the codes decode to.

Read are bitsandbytes 4-bit and GPTQ, as transformers saves them, and surgeon's own form (`surgeon.stored_codes`).
GPTQ stores `qweight` int32 `[in · bits / 32, out]`, `scales` `[groups, out]` and `qzeros` int32 `[groups,
out · bits / 32]`, whose zero points are one too small in the first version of the format ("gptq") and right in the
second ("gptq_v2").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from surgeon.bitsandbytes_state import from_state, is_part
from surgeon.checkpoint import Checkpoint
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.numerics import FourBit, dequantise_4bit
from surgeon.numerics_int import Groups, dequantise_groups
from surgeon.packing import unpack
from surgeon.passes.intq import IntQ
from surgeon.passes.nf4 import Nf4
from surgeon.passes.quantiser import Quantiser
from surgeon.safetensors_file import TensorInfo

Codes = FourBit | Groups
_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
_OWN = ("codes", "scale", "zero")
_AGAIN = "download or save the checkpoint again"


class CodedCheckpoint(Checkpoint):
    """A quantised checkpoint seen as the one it was made from: every coded weight has its own name, shape and dtype.

    Attributes:
        raw: the checkpoint as it is stored.
        step: the pass that stands for the quantisation, its targets the modules that are in codes.
        coded: stored name of a weight → names of the tensors it is made of.
    """

    def __init__(self, raw: Checkpoint, find: _Format) -> None:
        config = {key: value for key, value in raw.config.items() if key != "quantization_config"}
        super().__init__(raw.folder, config, raw.shards)
        self.raw, self._format = raw, find
        self.coded = find.weights(raw)
        if not self.coded:
            raise UsageError("config.json says that the weights are quantised, and none is", str(raw.folder), _AGAIN)
        first = self.codes_of(next(iter(self.coded)))
        self.step = find.step(first, [name.removesuffix(".weight") for name in self.coded])
        parts = {part for names in self.coded.values() for part in names}
        infos = {name: info for name, info in raw.tensors.items() if name not in parts or name in self.coded}
        self.tensors = infos | {name: self._info(name) for name in self.coded}

    def codes_of(self, name: str) -> Codes:
        """The codes of a coded weight."""
        tensors = {part: self.raw.read(part) for part in self.coded[name]}
        return self._format.read(name, tensors, str(self.folder))

    def read(self, name: str) -> torch.Tensor:
        """A stored tensor, or what the codes of a weight decode to, in the dtype it had."""
        if name not in self.coded:
            return super().read(name)
        codes = self.codes_of(name)
        dtype = self.tensors[name].dtype
        return dequantise_4bit(codes, dtype) if isinstance(codes, FourBit) else dequantise_groups(codes, dtype)

    def release(self) -> None:
        """Give the mapped pages back."""
        super().release()
        self.raw.release()

    def fingerprint(self) -> str:
        """That of the files."""
        return self.raw.fingerprint()

    def _info(self, name: str) -> TensorInfo:
        stored = self.raw.tensors[self.coded[name][0]]
        shape, dtype = self._format.shape(name, self.raw, self.coded[name])
        return replace(stored, name=name, shape=shape, dtype=dtype)


class _Format:
    """One way of saving codes."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype

    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        """Stored name of each coded weight → the tensors it is made of."""
        raise UnsupportedError("no such format", str(raw.folder))

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        """The codes of a weight."""
        raise UnsupportedError("no such format", where)

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a weight before it was quantised."""
        raise UnsupportedError("no such format", name)

    def step(self, codes: Codes, paths: list[str]) -> Quantiser:
        """The pass that makes such codes."""
        raise UnsupportedError("no such format", paths[0])


class _BitsAndBytes(_Format):
    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for part in raw.tensors:
            if is_part(part):
                owner = part.partition(".quant_state.")[0] if ".quant_state." in part else part.rpartition(".")[0]
                found.setdefault(owner, [owner]).append(part)
        return found

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        return from_state(name, tensors, where)[0]

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        stored, dtype = from_state(name, {part: raw.read(part) for part in parts}, str(raw.folder))
        return stored.shape, dtype

    def step(self, codes: Codes, paths: list[str]) -> Quantiser:
        assert isinstance(codes, FourBit)
        return Nf4(targets=",".join(paths), kind=codes.kind, double=codes.nested is not None)


class _Gptq(_Format):
    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        stems = [name.removesuffix(".qweight") for name in raw.tensors if name.endswith(".qweight")]
        return {
            f"{stem}.weight": [f"{stem}.{part}" for part in _GPTQ if f"{stem}.{part}" in raw.tensors] for stem in stems
        }

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        stem, bits = name.removesuffix(".weight"), int(self.config["bits"])
        packed = tensors[f"{stem}.qweight"].t().contiguous().view(torch.uint8)
        scales = tensors[f"{stem}.scales"].t().float().contiguous()
        zeros = unpack(tensors[f"{stem}.qzeros"].contiguous().view(torch.uint8), bits).t().float()
        if str(self.config.get("checkpoint_format", "gptq")) == "gptq":
            zeros = (zeros + 1).remainder(2**bits)
        found = Groups(packed, scales, zeros.contiguous(), bits)
        order = tensors.get(f"{stem}.g_idx")
        if order is not None and not torch.equal(order.long(), torch.arange(found.shape[1]) // found.group):
            hint = "quantise it with desc_act=False, or take the original weights"
            raise UnsupportedError(f"{name} was quantised in another order of its inputs (act-order)", where, hint)
        return found

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        words, out = raw.tensors[f"{name.removesuffix('.weight')}.qweight"].shape
        return (out, words * 32 // int(self.config["bits"])), self.dtype

    def step(self, codes: Codes, paths: list[str]) -> Quantiser:
        return _integers(codes, paths)


class _Own(_Format):
    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        names = [name.removesuffix(".codes") for name in raw.tensors if name.endswith(".codes")]
        return {name: [f"{name}.{part}" for part in _OWN] for name in names}

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        codes, scale, zero = (tensors[f"{name}.{part}"] for part in _OWN)
        return Groups(codes, scale, zero, int(self.config["bits"]))

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        out, width = raw.tensors[f"{name}.codes"].shape
        return (out, width * 8 // int(self.config["bits"])), self.dtype

    def step(self, codes: Codes, paths: list[str]) -> Quantiser:
        return _integers(codes, paths)


def _integers(codes: Codes, paths: list[str]) -> Quantiser:
    assert isinstance(codes, Groups)
    group = -1 if codes.scale.shape[1] == 1 else codes.group
    return IntQ(targets=",".join(paths), bits=codes.bits, group=group)


_FORMATS: Mapping[str, Callable[[Mapping[str, Any], torch.dtype], _Format]] = {
    "bitsandbytes": _BitsAndBytes, "gptq": _Gptq, "surgeon": _Own,
}  # fmt: skip


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
    if method not in _FORMATS or (method == "bitsandbytes" and not config.get("load_in_4bit")):
        what = f"the checkpoint is quantised ({method}{', 8 bits' if method == 'bitsandbytes' else ''})"
        hint = f"read are {', '.join(_FORMATS)} (bitsandbytes in 4 bits); or use the checkpoint it was quantised from"
        raise UnsupportedError(what, str(checkpoint.folder), hint)
    named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    return CodedCheckpoint(checkpoint, _FORMATS[method](config, getattr(torch, named, torch.float32)))


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
