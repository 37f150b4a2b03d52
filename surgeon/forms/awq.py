"""AWQ's form in its version gemm, which AutoAWQ and GPTQModel write and vLLM loads: 4 bits, read only.

`qweight` int32 `[in, out / 8]`, `qzeros` int32 `[groups, out / 8]`, `scales` fp16 `[groups, out]`: words hold outputs,
not inputs, and nibble i of a word, the lowest first, is output 0, 2, 4, 6, 1, 3, 5, 7 of its eight. Zero points are
stored as they are:

    w[o, i] = scales[i // g, o] · (qweight[i, o] − qzeros[i // g, o])

The factors that AWQ searches (Lin et al. 2024, §3.2) are folded into norms and linears when the file is written. Where
an activation function lies between them they are a tensor of its own, `act.scales`, which no linear can take in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgeon.checkpoint import Checkpoint
from surgeon.errors import UnsupportedError, UsageError
from surgeon.forms.base import AGAIN, Codes, Reader
from surgeon.numerics_int import Groups
from surgeon.packing import pack, unpack

METHOD, VERSION, BITS = "awq", "gemm", 4
_PARTS = ("qweight", "qzeros", "scales")
_WORD = 32 // BITS
_HINT = "quantise it in the version gemm with 4 bits, or take the original weights"


class AwqReader(Reader):
    """The version gemm.

    Raises:
        UnsupportedError: another version of the layout, another width, or modules with widths of their own.
    """

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        version = str(config.get("version") or config.get("checkpoint_format") or config.get("format") or VERSION)
        if config.get("backend") == "llm-awq":  # the authors' own packing, which transformers tells by its backend
            version = "llm-awq"
        bits = config.get("bits", config.get("w_bit", BITS))
        if version.lower() != VERSION:
            raise UnsupportedError(f"its version of AWQ is {version}", "quantization_config", _HINT)
        if bits != BITS:
            raise UnsupportedError(f"its AWQ codes have {bits} bits", "quantization_config", _HINT)
        if own := [pattern for pattern, options in (config.get("dynamic") or {}).items() if options]:
            raise UnsupportedError(f"modules have widths of their own ({own[0]})", "quantization_config", _HINT)

    def weights(self, raw: Checkpoint) -> dict[str, list[str]]:
        """Those with a qweight, but for modules that config.json says are not converted."""
        stems = [name.removesuffix(".qweight") for name in raw.tensors if name.endswith(".qweight")]
        known, where = set(stems), str(raw.folder)
        scaled = [
            name for name in raw.tensors if name.endswith(".scales") and name.removesuffix(".scales") not in known
        ]
        if scaled:
            what = f"{scaled[0]} divides an activation, and no linear can take it in"
            raise UnsupportedError(what, where, "take the original weights")
        for stem in stems:
            if missing := [part for part in _PARTS if f"{stem}.{part}" not in raw.tensors]:
                raise UsageError(f"{stem} has a qweight and no {missing[0]}", where, AGAIN)
        return {f"{stem}.weight": [f"{stem}.{part}" for part in _PARTS] for stem in stems if self._converted(stem, raw)}

    def _converted(self, stem: str, raw: Checkpoint) -> bool:
        from transformers.quantizers.quantizers_utils import should_convert_module

        if should_convert_module(stem, self.config.get("modules_to_not_convert")):
            return True
        if f"{stem}.weight" not in raw.tensors:
            what = f"modules_to_not_convert names {stem}, which is stored in codes alone"
            raise UsageError(
                what, str(raw.folder), "take the name out of config.json, or download the checkpoint again"
            )
        return False

    def read(self, name: str, tensors: Mapping[str, torch.Tensor], where: str) -> Codes:
        """The codes, inputs along a row; raises UsageError if the tensors do not fit one another."""
        stem = name.removesuffix(".weight")
        stored, zeros, scales = (tensors[f"{stem}.{part}"] for part in _PARTS)
        self._check(name, stored, zeros, scales, where)
        codes = pack(_outputs(stored).t().contiguous(), BITS)
        return Groups(codes, scales.t().float().contiguous(), _outputs(zeros).t().float().contiguous(), BITS)

    def _check(self, name: str, stored: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, where: str) -> None:
        (inp, words), groups = stored.shape, len(scales)
        size = int(self.config.get("group_size", self.config.get("q_group_size", -1)))
        fitting = scales.shape[1] == words * _WORD and tuple(zeros.shape) == (groups, words)
        if not fitting or inp != groups * (inp if size == -1 else size):
            what = f"{name} has {[inp, words]} words, {list(zeros.shape)} of zero points, {list(scales.shape)} scales"
            raise UsageError(f"{what} in groups of {size}", where, AGAIN)

    def shape(self, name: str, raw: Checkpoint, parts: list[str]) -> tuple[tuple[int, ...], torch.dtype]:
        """From the words of the codes."""
        inp, words = raw.tensors[f"{name.removesuffix('.weight')}.qweight"].shape
        return (words * _WORD, inp), self.dtype


def _outputs(words: torch.Tensor) -> torch.Tensor:
    """Words `[n, out / 8]` → codes uint8 `[n, out]`: the even outputs of eight lie in a word before the odd ones."""
    nibbles = unpack(words.contiguous().view(torch.uint8), BITS)
    return nibbles.view(len(words), -1, 2, _WORD // 2).transpose(2, 3).reshape(len(words), -1)
