"""surgeon's own form of group-wise integers, the one that holds zero points in floating point.

For a weight `w` the tensors `w.codes` uint8, `w.scale` and `w.zero` (see `surgeon.numerics_int`), and in config.json
`quantization_config` = `{"quant_method": "surgeon", "bits": N, "modules": [paths]}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from surgeon.checkpoint import Checkpoint
from surgeon.forms.base import Codes, IntegerWriter, Layout, Parts, Reader, _integers
from surgeon.numerics_int import Groups
from surgeon.passes.quantiser import Quantiser

METHOD = "surgeon"
_PARTS = ("codes", "scale", "zero")


class OwnWriter(IntegerWriter):
    """Codes, scales and zero points as they are."""

    name: ClassVar[str] = METHOD

    @classmethod
    def suited(cls, step: Quantiser, dtype: torch.dtype) -> Quantiser:
        """As it is; raises UnsupportedError for 4-bit books."""
        return _integers(step, cls.name)

    @property
    def scales(self) -> torch.dtype:
        """What the quantiser rounds them to."""
        found: torch.dtype = getattr(torch, self.integers.scales)
        return found

    def config(self, quantised: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
        """The width, and which modules."""
        return {"quant_method": METHOD, "bits": self.integers.bits, "modules": list(quantised)}

    def layouts(self, stored: str, out: int, inp: int) -> list[Layout]:
        """The parts; a zero point that a merge has moved is not rounded with the scales."""
        shapes = {part: shape for part, shape, _ in self.integers.shapes(out, inp)}
        dtypes = {"codes": torch.uint8, "scale": self.scales, "zero": self._zero}
        return [(f"{stored}.{part}", dtypes[part], shapes[part]) for part in _PARTS]

    def tensors(self, stored: str, parts: Parts, out: int, inp: int) -> dict[str, torch.Tensor]:
        """The parts."""
        dtypes = {"codes": torch.uint8, "scale": self.scales, "zero": self._zero}
        return {f"{stored}.{part}": parts[part].to(dtypes[part]) for part in _PARTS}

    @property
    def _zero(self) -> torch.dtype:
        return torch.float32 if self.integers.zero == "float" else self.scales

    def rounded(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Nothing is rounded that the quantiser has not rounded."""
        return dict(parts)

    def misfits(self, parts: Parts) -> int:
        """None."""
        return 0


class OwnReader(Reader):
    """Codes, scales and zero points."""

    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        """Those with codes."""
        names = [name.removesuffix(".codes") for name in raw.tensors if name.endswith(".codes")]
        return {name: [f"{name}.{part}" for part in _PARTS] for name in names}

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        """In the dtype of the arithmetic."""
        codes, scale, zero = (tensors[f"{name}.{part}"] for part in _PARTS)
        return Groups(codes, scale.float(), zero.float(), int(self.config["bits"]))

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        """From the codes."""
        out, width = raw.tensors[f"{name}.codes"].shape
        return (out, width * 8 // int(self.config["bits"])), self.dtype

    def direct(self, name: str) -> dict[str, str]:
        """All of them; scales may have another dtype."""
        return {part: f"{name}.{part}" for part in _PARTS}
