"""NF4 and FP4 as transformers saves bitsandbytes' 4-bit models (`surgeon.bitsandbytes_state`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from surgeon.bitsandbytes_state import from_state, is_part, to_state
from surgeon.checkpoint import Checkpoint
from surgeon.errors import UnsupportedError
from surgeon.forms.base import Codes, Layout, Parts, Reader, Writer
from surgeon.numerics import FourBit, Nested, code_book, dynamic_map
from surgeon.passes.nf4 import Nf4
from surgeon.passes.quantiser import Quantiser

JSON_BYTES = 256
"""Room for a quant_state, so that a file's size is known before its weights are quantised."""


class BitsAndBytesWriter(Writer):
    """4-bit books; `from_pretrained` loads them."""

    name: ClassVar[str] = "bitsandbytes"

    @classmethod
    def suited(cls, step: Quantiser, dtype: torch.dtype) -> Quantiser:
        """As it is; raises UnsupportedError for integers."""
        if not isinstance(step, Nf4):
            what = f"the form bitsandbytes holds 4-bit books, and {step.name} makes none"
            raise UnsupportedError(what, "--format", "--format gptq or compressed-tensors, or quantise with nf4")
        return step

    @property
    def books(self) -> Nf4:
        """The quantiser."""
        assert isinstance(self.step, Nf4)
        return self.step

    def config(self, quantised: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
        """As transformers writes it; `others` are not converted."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": self.books.kind,
            "bnb_4bit_use_double_quant": self.books.double,
            "bnb_4bit_compute_dtype": str(self.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(others) or None,
        }

    def layouts(self, stored: str, out: int, inp: int) -> list[Layout]:
        """Codes, absmax, and the books and facts that come with every weight."""
        shapes = {part: shape for part, shape, _ in self.books.shapes(out, inp)}
        made = [
            (stored, torch.uint8, (*shapes["codes"], 1)),
            (f"{stored}.absmax", torch.uint8 if self.books.double else torch.float32, shapes["absmax"]),
            (f"{stored}.quant_map", torch.float32, tuple(code_book(self.books.kind).shape)),
            (f"{stored}.quant_state.bitsandbytes__{self.books.kind}", torch.uint8, (JSON_BYTES,)),
        ]
        if self.books.double:
            made.append((f"{stored}.nested_absmax", torch.float32, shapes["scale"]))
            made.append((f"{stored}.nested_quant_map", torch.float32, tuple(dynamic_map().shape)))
        return made

    def tensors(self, stored: str, parts: Parts, out: int, inp: int) -> dict[str, torch.Tensor]:
        """The state of the weight."""
        nested = Nested(parts["scale"], parts["offset"]) if self.books.double else None
        packed = FourBit(parts["codes"], parts["absmax"], (out, inp), self.books.kind, nested)
        return to_state(stored, packed, self.dtype, JSON_BYTES)


class BitsAndBytesReader(Reader):
    """4-bit books."""

    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        """Those with a quant_state."""
        found: dict[str, list[str]] = {}
        for part in raw.tensors:
            if is_part(part):
                owner = part.partition(".quant_state.")[0] if ".quant_state." in part else part.rpartition(".")[0]
                found.setdefault(owner, [owner]).append(part)
        return found

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        """The codes, as its quant_state describes them."""
        return from_state(name, tensors, where)[0]

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        """As the quant_state says."""
        stored, dtype = from_state(name, {part: raw.read(part) for part in parts}, str(raw.folder))
        return stored.shape, dtype

    def step(self, codes: Codes, paths: list[str]) -> Quantiser:
        """nf4."""
        assert isinstance(codes, FourBit)
        return Nf4(targets=",".join(paths), kind=codes.kind, double=codes.nested is not None)

    def direct(self, name: str) -> dict[str, str]:
        """All but the offset of a double quantisation, which is in the quant_state."""
        return {"codes": name, "absmax": f"{name}.absmax", "scale": f"{name}.nested_absmax"}
