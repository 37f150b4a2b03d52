"""NF4 and FP4 weights: y = x Wᵀ + bias with W in 4-bit codes of a book, an absmax per 64 (Dettmers et al. 2023, §3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError
from surgeon.passes.quantiser import Quantiser

if TYPE_CHECKING:
    import torch

    from surgeon.sites import Site


@dataclass(frozen=True)
class Nf4(Quantiser):
    """Linear weights in bitsandbytes' 4-bit format, equal to it bit for bit (see `surgeon.numerics`).

    codes: uint8 `[⌈n / 2⌉]`; absmax: fp32 `[⌈n / 64⌉]`, or with double quantisation uint8 with scale: fp32
    `[⌈n / 16384⌉]` and offset: fp32 `[]`. 4.127 bits per weight, 4.5 without double quantisation.

    Options:
        kind: "nf4", whose values are quantiles of a normal distribution, or "fp4".
        double: quantise the absmax too.
    """

    name: ClassVar[str] = "nf4"
    kind: str = "nf4"
    double: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("nf4", "fp4"):
            raise UsageError(f"{self.name}: there is no 4-bit type '{self.kind}'", "--kind", "one of nf4, fp4")

    def shapes(self, out: int, inp: int) -> list[tuple[str, tuple[int, ...], torch.dtype | None]]:
        """Codes and absmax, and what undoes the quantisation of absmax."""
        import torch

        from surgeon.numerics import BLOCK, NESTED_BLOCK

        blocks = -(-out * inp // BLOCK)
        made: list[tuple[str, tuple[int, ...], torch.dtype | None]] = [("codes", (-(-out * inp // 2),), torch.uint8)]
        made.append(("absmax", (blocks,), torch.uint8 if self.double else torch.float32))
        if self.double:
            made.append(("scale", (-(-blocks // NESTED_BLOCK),), torch.float32))
            made.append(("offset", (), torch.float32))
        return made

    def encode(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """Blocks run over the flattened `[out, in]`, across rows where in is no multiple of 64."""
        from surgeon.numerics import quantise_4bit

        stored = quantise_4bit(matrix, self.kind, double=self.double)
        made = {"codes": stored.codes, "absmax": stored.absmax}
        if stored.nested is not None:
            made |= {"scale": stored.nested.scale, "offset": stored.nested.offset}
        return made

    def decode(self, parts: dict[str, torch.Tensor], site: Site) -> torch.Tensor:
        """book[code] · absmax in fp32."""
        from surgeon.quantised import nf4_weight

        return nf4_weight(**parts, out=site.out, inp=site.inp, kind=self.kind)

    def operator(self, site: Site) -> tuple[Any, dict[str, Any]]:
        """`surgeon.nf4_linear`."""
        import torch

        from surgeon import quantised

        assert quantised
        return torch.ops.surgeon.nf4_linear.default, {"out": site.out, "inp": site.inp, "kind": self.kind}
