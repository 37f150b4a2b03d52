"""GPTQ's form, which GPTQModel, vLLM and ExLlama load: both versions of it.

`qweight` int32 `[in · bits / 32, out]`, `scales` fp16 `[groups, out]`, `qzeros` int32 `[groups, out · bits / 32]`, and
`g_idx` int32 `[in]`, the group of each input. Zero points are one too small in the first version ("gptq") and right in
the second ("gptq_v2"). The first is made by taking 1 from all codes of an int32 word at once, so that a zero point of 0
takes its 1 from the next one: it is read by adding it back in the same way, and never written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from surgeon.checkpoint import Checkpoint
from surgeon.errors import UnsupportedError
from surgeon.forms.base import Codes, IntegerWriter, Layout, Parts, Range, Reader, suited_integers
from surgeon.numerics_int import Groups
from surgeon.packing import pack, unpack, words
from surgeon.passes.quantiser import Quantiser

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GptqWriter(IntegerWriter):
    """The second version, in which every zero point has its place."""

    name: ClassVar[str] = "gptq_v2"
    less: ClassVar[int] = 0

    @classmethod
    def suited(cls, step: Quantiser, dtype: torch.dtype) -> Quantiser:
        """Integer zero points and scales in fp16."""
        return suited_integers(step, cls.name, torch.float16)

    def config(self, quantised: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
        """As GPTQModel writes it; `dynamic` names linears of the layers that are no codes."""
        step = self.integers
        left: dict[str, Any] = {f"-:^{re.escape(path)}$": {} for path in others if _in_layers(path)}
        return {
            "quant_method": "gptq",
            "bits": step.bits,
            "group_size": step.group,
            "sym": step.zero == "symmetric",
            "desc_act": False,
            "act_group_aware": False,
            "true_sequential": True,
            "static_groups": False,
            "damp_percent": step.damping or 0.01,
            "lm_head": "lm_head" in quantised,
            "format": self.name,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            **({"dynamic": left} if left else {}),
        }

    def unfit(self, out: int, inp: int, transposed: bool) -> str:
        """Rows or columns that fill no whole words."""
        bits = self.integers.bits
        odd = next((size for size in (inp, out) if size * bits % 32), 0)
        return f"{odd} codes of {bits} bits fill no whole 32-bit words, which GPTQ's form needs" if odd else ""

    def layouts(self, stored: str, out: int, inp: int) -> list[Layout]:
        """Of the four tensors."""
        bits, groups, stem = self.integers.bits, self.integers.groups(inp), stored.removesuffix(".weight")
        return [
            (f"{stem}.qweight", torch.int32, (inp * bits // 32, out)),
            (f"{stem}.qzeros", torch.int32, (groups, out * bits // 32)),
            (f"{stem}.scales", torch.float16, (groups, out)),
            (f"{stem}.g_idx", torch.int32, (inp,)),
        ]

    def tensors(self, stored: str, parts: Parts, out: int, inp: int) -> dict[str, torch.Tensor]:
        """Codes and zero points as words, inputs first."""
        stem, bits = stored.removesuffix(".weight"), self.integers.bits
        zeros = (parts["zero"].t() - self.less).to(torch.uint8).contiguous()
        return {
            f"{stem}.qweight": words(parts["codes"]).t().contiguous(),
            f"{stem}.qzeros": words(pack(zeros, bits)),
            f"{stem}.scales": parts["scale"].t().to(torch.float16).contiguous(),
            f"{stem}.g_idx": (torch.arange(inp) // (inp // self.integers.groups(inp))).int(),
        }


class GptqV1Writer(GptqWriter):
    """The first version: zero points are one too small, and there is no place for 0."""

    name: ClassVar[str] = "gptq"
    less: ClassVar[int] = 1

    @classmethod
    def suited(cls, step: Quantiser, dtype: torch.dtype) -> Quantiser:
        """Symmetric, where zero points were in floating point: one of a hundred integer ones would be 0."""
        return suited_integers(step, cls.name, torch.float16, "symmetric")

    @property
    def zeros(self) -> Range:
        """1 … 2^N − 1; 2^N fits into words too, and some readers take it for 0."""
        found = super().zeros
        return Range(max(1, found.low), found.high)


class GptqReader(Reader):
    """Both versions, in the order of the inputs only, and with one width for all."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.version = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        hint = "quantise it in the format gptq or gptq_v2, or take the original weights"
        if self.version not in (GptqWriter.name, GptqV1Writer.name):
            raise UnsupportedError(f"its checkpoint_format is {self.version}", "quantization_config", hint)
        if own := [pattern for pattern, options in (config.get("dynamic") or {}).items() if options]:
            raise UnsupportedError(f"modules have widths of their own ({own[0]})", "quantization_config", hint)

    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        """Those with a qweight."""
        stems = [name.removesuffix(".qweight") for name in raw.tensors if name.endswith(".qweight")]
        return {
            f"{stem}.weight": [f"{stem}.{part}" for part in _PARTS if f"{stem}.{part}" in raw.tensors] for stem in stems
        }

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        """The codes; raises UnsupportedError for act-order."""
        stem, bits = name.removesuffix(".weight"), int(self.config["bits"])
        packed = tensors[f"{stem}.qweight"].t().contiguous().view(torch.uint8)
        scales = tensors[f"{stem}.scales"].t().float().contiguous()
        found = Groups(packed, scales, self._zeros(tensors[f"{stem}.qzeros"], bits), bits)
        order = tensors.get(f"{stem}.g_idx")
        if order is not None and not torch.equal(order.long(), torch.arange(found.shape[1]) // found.group):
            hint = "quantise it with desc_act=False, or take the original weights"
            raise UnsupportedError(f"{name} was quantised in another order of its inputs (act-order)", where, hint)
        return found

    def _zeros(self, stored: torch.Tensor, bits: int) -> torch.Tensor:
        first = self.version == GptqV1Writer.name
        if first and bits != 3:  # codes of 3 bits do not lie in one word each
            stored = stored + int(sum(1 << shift for shift in range(0, 31, bits)))
        zeros = unpack(stored.contiguous().view(torch.uint8), bits)
        if first and bits == 3:
            zeros = (zeros + 1).remainder(2**bits)
        return zeros.t().float().contiguous()

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        """From the words of the codes."""
        count, out = raw.tensors[f"{name.removesuffix('.weight')}.qweight"].shape
        return (out, count * 32 // int(self.config["bits"])), self.dtype


def _in_layers(path: str) -> bool:
    """Whether a linear lies in a block with a number; readers leave others as they are."""
    return any(word.isdigit() for word in path.split("."))
