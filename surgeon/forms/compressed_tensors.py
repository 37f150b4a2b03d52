"""compressed-tensors' pack-quantized form (W4A16, W8A16), which transformers and vLLM load.

`weight_packed` int32 `[out, in · bits / 32]`, `weight_scale` `[out, groups]` in the dtype of the model, `weight_shape`
int64 `[2]` and, if asymmetric, `weight_zero_point` int32 `[out · bits / 32, groups]`, packed over the outputs. Codes
and zero points are signed there and stored with 2^(bits − 1) added, which makes them ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from surgeon.checkpoint import Checkpoint
from surgeon.errors import UnsupportedError, UsageError
from surgeon.forms.base import AGAIN, Codes, IntegerWriter, Layout, Parts, Reader, suited_integers
from surgeon.numerics_int import Groups
from surgeon.packing import pack, unpack, words
from surgeon.passes.quantiser import Quantiser

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
BITS = (2, 4, 8)
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class CompressedTensorsWriter(IntegerWriter):
    """Integers of 2, 4 or 8 bits; with 3 the layout differs between versions of the library."""

    name: ClassVar[str] = METHOD

    @classmethod
    def suited(cls, step: Quantiser, dtype: torch.dtype) -> Quantiser:
        """Integer zero points and scales in the dtype of the model; raises UnsupportedError for 3 bits."""
        found = suited_integers(step, cls.name, dtype)
        if found.bits not in BITS:
            what = f"the form {cls.name} has no codes of {found.bits} bits that every version of it reads alike"
            raise UnsupportedError(what, "--format", "--bits 4, or --format gptq or surgeon")
        return found

    @property
    def scales(self) -> torch.dtype:
        """The dtype of the model."""
        return self.dtype

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return self.integers.zero == "symmetric"

    def config(self, quantised: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
        """All linears but `others`."""
        weights = {
            "num_bits": self.integers.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.integers.group == -1 else "group",
            "group_size": None if self.integers.group == -1 else self.integers.group,
            "dynamic": False,
            "observer": "minmax",
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        return {
            "quant_method": METHOD,
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {"group_0": {**group, "format": FORMAT}},
            "ignore": sorted(others),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def unfit(self, out: int, inp: int, transposed: bool) -> str:
        """Conv1D, and rows that fill no whole words."""
        bits = self.integers.bits
        if transposed:
            return "it is a Conv1D, which compressed-tensors does not have"
        return f"{inp} codes of {bits} bits fill no whole 32-bit words" if inp * bits % 32 else ""

    def layouts(self, stored: str, out: int, inp: int) -> list[Layout]:
        """Of three tensors, or four."""
        bits, groups, stem = self.integers.bits, self.integers.groups(inp), stored.removesuffix(".weight")
        made = [
            (f"{stem}.weight_packed", torch.int32, (out, inp * bits // 32)),
            (f"{stem}.weight_scale", self.scales, (out, groups)),
            (f"{stem}.weight_shape", torch.int64, (2,)),
        ]
        zeros = (f"{stem}.weight_zero_point", torch.int32, (-(-out * bits // 32), groups))
        return made if self.symmetric else [*made, zeros]

    def tensors(self, stored: str, parts: Parts, out: int, inp: int) -> dict[str, torch.Tensor]:
        """Codes as words along the inputs, zero points along the outputs."""
        stem, bits = stored.removesuffix(".weight"), self.integers.bits
        made = {
            f"{stem}.weight_packed": words(parts["codes"]),
            f"{stem}.weight_scale": parts["scale"].to(self.scales),
            f"{stem}.weight_shape": torch.tensor([out, inp]),
        }
        if not self.symmetric:
            zeros = F.pad(parts["zero"].t(), (0, -out % (32 // bits))).to(torch.uint8).contiguous()
            made[f"{stem}.weight_zero_point"] = words(pack(zeros, bits)).t().contiguous()
        return made


class CompressedTensorsReader(Reader):
    """One group of integers for weights, activations as they are."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        groups = list((config.get("config_groups") or {}).values())
        if str(config.get("format")) != FORMAT or len(groups) != 1 or not isinstance(groups[0], dict):
            what = f"its format is {config.get('format')} with {len(groups)} groups"
            raise UnsupportedError(what, METHOD, f"{FORMAT} with one group is read; or use the original weights")
        self.weight: Mapping[str, Any] = groups[0].get("weights") or {}
        if groups[0].get("input_activations") or groups[0].get("output_activations"):
            raise UnsupportedError("its activations are quantised too", METHOD, "use the original weights")

    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        """Those with a weight_packed; raises UnsupportedError for act-order."""
        found: dict[str, list[str]] = {}
        for stem in (name.removesuffix(".weight_packed") for name in raw.tensors if name.endswith(".weight_packed")):
            if f"{stem}.weight_g_idx" in raw.tensors:
                what = f"{stem} was quantised in another order of its inputs (act-order)"
                raise UnsupportedError(what, str(raw.folder), "quantise it without, or take the original weights")
            found[f"{stem}.weight"] = [f"{stem}.{part}" for part in _PARTS if f"{stem}.{part}" in raw.tensors]
        return found

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        """The codes; raises UsageError if they do not fit the shape."""
        stem, bits = name.removesuffix(".weight"), int(self.weight["num_bits"])
        stored = tensors[f"{stem}.weight_packed"]
        out, inp = (int(size) for size in tensors[f"{stem}.weight_shape"])
        if tuple(stored.shape) != (out, inp * bits // 32):
            what = f"{name} has {list(stored.shape)} words for [{out}, {inp}] codes of {bits} bits"
            raise UsageError(what, where, AGAIN)
        scale = tensors[f"{stem}.weight_scale"].float().contiguous()
        packed = stored.contiguous().view(torch.uint8)
        if f"{stem}.weight_zero_point" not in tensors:
            return Groups(packed, scale, torch.full_like(scale, 2 ** (bits - 1)), bits)
        points = tensors[f"{stem}.weight_zero_point"].t().contiguous().view(torch.uint8)
        return Groups(packed, scale, unpack(points, bits)[:, :out].t().float().contiguous(), bits)

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        """As it is stored."""
        out, inp = (int(size) for size in raw.read(f"{name.removesuffix('.weight')}.weight_shape"))
        return (out, inp), self.dtype

    def direct(self, name: str) -> dict[str, str]:
        """Words of 32 bits are in the order of our bytes; scales may have another dtype."""
        stem = name.removesuffix(".weight")
        return {"codes": f"{stem}.weight_packed", "scale": f"{stem}.weight_scale"}
