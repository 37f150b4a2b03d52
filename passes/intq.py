"""Group-wise integer weights: w = scale · (code − zero) per row and group of inputs, 2, 3, 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError
from surgeon.passes.quantiser import Quantiser

if TYPE_CHECKING:
    import torch

    from surgeon.hold import Part
    from surgeon.sites import Site

ZEROS = ("float", "integer", "symmetric")


@dataclass(frozen=True)
class IntQ(Quantiser):
    """Linear weights in integer codes, min–max quantised (see `surgeon.numerics_int`).

    codes: uint8 `[out, in · bits / 8]`; scale, zero: `[out, in / group]`. bits + 64 / group bits per weight.

    Options:
        bits: of a code: 2, 3, 4 or 8.
        group: inputs that share a scale and a zero point; -1 for a whole row.
        zero: "float" (a merge of QA-LoRA is exact), "integer" (every runtime reads it) or "symmetric" (no zero point).
    """

    name: ClassVar[str] = "intq"
    bits: int = 4
    group: int = 32
    zero: str = "float"

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise UsageError(f"{self.name}: there are no codes of {self.bits} bits", "--bits", "one of 2, 3, 4, 8")
        if self.zero not in ZEROS:
            raise UsageError(f"{self.name}: zero is '{self.zero}'", "--zero", f"one of {', '.join(ZEROS)}")

    def unfit(self, site: Site) -> str:
        """The inputs are no whole number of groups, or of bytes."""
        from surgeon.numerics_int import check_groups

        try:
            check_groups(site.inp, self.group, self.bits)
        except UsageError as error:
            return f"{error.what} (try {error.hint})"
        return ""

    def parts(self, site: Site) -> Sequence[Part]:
        """Codes, scales and zero points."""
        import torch

        from surgeon.hold import Part
        from surgeon.numerics_int import check_groups

        groups = site.inp // check_groups(site.inp, self.group, self.bits)
        shape = (site.out, groups)
        return [
            Part("codes", (site.out, site.inp * self.bits // 8), torch.uint8),
            Part("scale", shape, None),
            Part("zero", shape, None),
        ]

    def encode(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """Min–max per row and group."""
        from surgeon.numerics_int import quantise_groups

        symmetric, free = self.zero == "symmetric", self.zero == "float"
        stored = quantise_groups(matrix, self.bits, self.group, symmetric=symmetric, float_zero=free)
        return {"codes": stored.codes, "scale": stored.scale, "zero": stored.zero}

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
