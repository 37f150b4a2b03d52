"""Group-wise integer weights: w = scale · (code − zero) per row and group of inputs, 2, 3, 4 or 8 bits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError
from surgeon.passes.quantiser import Quantiser

if TYPE_CHECKING:
    import torch

    from surgeon.graph import Graph
    from surgeon.numerics_int import Groups
    from surgeon.sites import Site

ZEROS = ("float", "integer", "symmetric")
SCALES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class IntQ(Quantiser):
    """Linear weights in integer codes: the nearest ones, or GPTQ's (`surgeon.numerics_int`, `surgeon.gptq`).

    codes: uint8 `[out, in · bits / 8]`; scale, zero: `[out, in / group]`. bits + 64 / group bits per weight.

    Options:
        bits: of a code: 2, 3, 4 or 8.
        group: inputs that share a scale and a zero point; -1 for a whole row.
        zero: "float" (a merge of QA-LoRA is exact), "integer" (every runtime reads it) or "symmetric" (no zero point).
        scales: float32, float16 or bfloat16, which scales and zero points are rounded to.
        calibration: a data file; codes are then GPTQ's on its samples, not the nearest ones.
        samples: of that file, the first so many.
        length: tokens of a sample, the first so many.
        damping: what is added to the Hessian of the inputs, as a share of its mean diagonal.
    """

    name: ClassVar[str] = "intq"
    bits: int = 4
    group: int = 32
    zero: str = "float"
    scales: str = "float32"
    calibration: str = ""
    samples: int = 128
    length: int = 512
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise UsageError(f"{self.name}: there are no codes of {self.bits} bits", "--bits", "one of 2, 3, 4, 8")
        if self.zero not in ZEROS:
            raise UsageError(f"{self.name}: zero is '{self.zero}'", "--zero", f"one of {', '.join(ZEROS)}")
        if self.scales not in SCALES:
            what = f"{self.name}: scales are '{self.scales}'"
            raise UsageError(what, "--scales", f"one of {', '.join(SCALES)}")
        if self.samples < 1 or self.length < 1 or self.damping < 0:
            what = f"{self.name}: {self.samples} samples of {self.length} tokens, damping {self.damping}"
            raise UsageError(what, "--samples", "at least one sample of one token, and a damping of at least 0")

    @property
    def derived(self) -> bool:
        """Codes that a calibration chose are stored."""
        return not self.calibration

    def prepare(self, graph: Graph, chosen: list[Site]) -> IntQ:
        """Calibrate, where there is a file to do it on; without weights (a plan) there is nothing to do."""
        if self.calibration in ("", "stored") or not graph.values:
            return self
        from surgeon import calibration, run

        calibration.prepare(graph, self, run.owner_of(graph, self), chosen)
        return dataclasses.replace(self, calibration=calibration.STORED)

    def initialise(self, graph: Graph, owner: str, seed: int, tokenizer: Any) -> None:
        """The calibrated codes in their places."""
        if self.calibration:
            from surgeon.calibration import place

            place(graph)

    def unfit(self, site: Site) -> str:
        """The inputs are no whole number of groups, or of bytes."""
        from surgeon.numerics_int import check_groups

        try:
            check_groups(site.inp, self.group, self.bits)
        except UsageError as error:
            return f"{error.what} (try {error.hint})"
        return ""

    def groups(self, inputs: int) -> int:
        """Groups of a row."""
        from surgeon.numerics_int import check_groups

        return inputs // check_groups(inputs, self.group, self.bits)

    def shapes(self, out: int, inp: int) -> list[tuple[str, tuple[int, ...], torch.dtype | None]]:
        """Codes, scales and zero points."""
        import torch

        each = (out, self.groups(inp))
        return [("codes", (out, inp * self.bits // 8), torch.uint8), ("scale", each, None), ("zero", each, None)]

    def encode(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """Min–max per row and group."""
        from surgeon.numerics_int import quantise_groups

        return self._parts(quantise_groups(matrix, self.bits, self.group, **self._mode()))

    def calibrated(self, matrix: torch.Tensor, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        """GPTQ's codes, with the factor of the Hessian of its inputs (`surgeon.gptq`)."""
        from surgeon.gptq import quantise_gptq

        return self._parts(quantise_gptq(matrix, factor, self.bits, self.group, **self._mode()))

    def _mode(self) -> dict[str, Any]:
        """How scales and zero points are made: the keywords of both quantisers."""
        import torch

        dtype = None if self.scales == "float32" else getattr(torch, self.scales)
        return {"symmetric": self.zero == "symmetric", "float_zero": self.zero == "float", "dtype": dtype}

    def _parts(self, stored: Groups) -> dict[str, torch.Tensor]:
        """In the dtype of the arithmetic, whatever they were rounded to."""
        import torch

        wide = torch.promote_types(stored.scale.dtype, torch.float32)
        return {"codes": stored.codes, "scale": stored.scale.to(wide), "zero": stored.zero.to(wide)}

    def decode(self, parts: dict[str, torch.Tensor], site: Site) -> torch.Tensor:
        """scale · (code − zero)."""
        from surgeon.quantised import int_weight

        return int_weight(**parts, bits=self.bits)

    def operator(self, site: Site) -> tuple[Any, dict[str, Any]]:
        """`surgeon.int_linear`."""
        import torch

        from surgeon import quantised

        assert quantised
        return torch.ops.surgeon.int_linear.default, {"bits": self.bits}
