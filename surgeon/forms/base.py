"""What a form of saved codes is: a writer that knows the tensors of a weight beforehand, and a reader of the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from surgeon.checkpoint import Checkpoint
from surgeon.errors import UnsupportedError
from surgeon.numerics import FourBit
from surgeon.numerics_int import Groups
from surgeon.passes.intq import IntQ
from surgeon.passes.quantiser import Quantiser

Codes = FourBit | Groups
Parts = Mapping[str, torch.Tensor]
Layout = tuple[str, torch.dtype, tuple[int, ...]]
AGAIN = "download or save the checkpoint again"


class Writer:
    """One way of saving the codes of a quantiser.

    Args:
        step: the quantiser.
        dtype: of the base's weights.
    """

    name: ClassVar[str] = ""

    def __init__(self, step: Quantiser, dtype: torch.dtype) -> None:
        self.step, self.dtype = step, dtype

    @classmethod
    def suited(cls, step: Quantiser, dtype: torch.dtype) -> Quantiser:
        """The quantiser with the options that this form needs, where it had others.

        Raises:
            UnsupportedError: its codes have no place in this form.
        """
        return step

    def config(self, quantised: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` of config.json, for the paths of the linears in codes and of the others."""
        return {}

    def unfit(self, out: int, inp: int, transposed: bool) -> str:
        """Why a weight of this shape cannot be saved so, or ""."""
        return ""

    def layouts(self, stored: str, out: int, inp: int) -> list[Layout]:
        """Name, dtype and shape of the tensors of a weight, without reading it."""
        return []

    def tensors(self, stored: str, parts: Parts, out: int, inp: int) -> dict[str, torch.Tensor]:
        """The tensors of a weight, from its parts in the graph (`Quantiser.parts`)."""
        return {}

    def rounded(self, parts: Parts) -> dict[str, torch.Tensor]:
        """The parts as this form can hold them."""
        return dict(parts)

    def misfits(self, parts: Parts) -> int:
        """How many zero points of a weight this form cannot hold."""
        return 0

    def nbytes(self, out: int, inp: int) -> int:
        """Bytes of the tensors of a weight."""
        return sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in self.layouts("w.weight", out, inp))


class Reader:
    """One way of saving codes, read.

    Args:
        config: `quantization_config` of config.json.
        dtype: of the weights before they were quantised.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype

    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        """Stored name of each coded weight → the tensors it is made of."""
        raise UnsupportedError("no such format", str(raw.folder))

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        """The codes of a weight."""
        raise UnsupportedError("no such format", where)

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        """`[out, in]` of a weight, and its dtype before it was quantised."""
        raise UnsupportedError("no such format", name)

    def direct(self, name: str) -> dict[str, str]:
        """Those parts in the graph (`Quantiser.parts`) whose bytes, or values, are those of one stored tensor."""
        return {}

    def step(self, codes: Codes, paths: list[str]) -> Quantiser:
        """The pass that makes such codes."""
        assert isinstance(codes, Groups)
        group = -1 if codes.scale.shape[1] == 1 else codes.group
        return IntQ(targets=",".join(paths), bits=codes.bits, group=group)


@dataclass(frozen=True)
class Range:
    """The integers that a form has for zero points."""

    low: int
    high: int

    def of(self, zero: torch.Tensor) -> torch.Tensor:
        """The nearest ones."""
        return zero.round().clamp(self.low, self.high)


class IntegerWriter(Writer):
    """A form of group-wise integers whose zero points are integers, and whose scales are in half precision."""

    @property
    def scales(self) -> torch.dtype:
        """The dtype of the scales."""
        return torch.float16

    @property
    def zeros(self) -> Range:
        """The zero points there are."""
        step = _integers(self.step, self.name)
        half = 2 ** (step.bits - 1)
        return Range(half, half) if step.zero == "symmetric" else Range(0, 2**step.bits - 1)

    def rounded(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Scales in the form's dtype, zero points among its integers."""
        scale, zero = parts["scale"], parts["zero"]
        return {**parts, "scale": scale.to(self.scales).to(scale.dtype), "zero": self.zeros.of(zero)}

    def misfits(self, parts: Parts) -> int:
        """Zero points that are no integer of the form's."""
        return int((self.zeros.of(parts["zero"]) != parts["zero"]).sum())

    @property
    def integers(self) -> IntQ:
        """The quantiser."""
        return _integers(self.step, self.name)


def _integers(step: Quantiser, form: str) -> IntQ:
    if not isinstance(step, IntQ):
        what = f"the form {form} holds group-wise integers, and {step.name} makes none"
        raise UnsupportedError(what, "--format", "--format bitsandbytes, or quantise with --method intq")
    return step


def suited_integers(step: Quantiser, form: str, scales: torch.dtype, instead: str = "integer") -> IntQ:
    """Scales of this dtype, and zero points of the mode `instead` where they were in floating point."""
    import dataclasses

    found = _integers(step, form)
    zero = instead if found.zero == "float" else found.zero
    return dataclasses.replace(found, zero=zero, scales=str(scales).removeprefix("torch."))
