"""Forms of saved codes: bitsandbytes, GPTQ in two versions, AWQ, compressed-tensors, surgeon's own. One file each."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from surgeon.errors import UsageError, nearest
from surgeon.forms.awq import AwqReader
from surgeon.forms.base import Codes, Layout, Reader, Writer
from surgeon.forms.bitsandbytes import BitsAndBytesReader, BitsAndBytesWriter
from surgeon.forms.compressed_tensors import CompressedTensorsReader, CompressedTensorsWriter
from surgeon.forms.gptq import GptqReader, GptqV1Writer, GptqWriter
from surgeon.forms.own import OwnReader, OwnWriter
from surgeon.passes.nf4 import Nf4
from surgeon.passes.quantiser import Quantiser

__all__ = ["READERS", "WRITERS", "Codes", "Layout", "Reader", "Writer", "find_writer", "writer_of"]

WRITERS: Mapping[str, type[Writer]] = {
    kind.name: kind for kind in (BitsAndBytesWriter, GptqV1Writer, GptqWriter, CompressedTensorsWriter, OwnWriter)
}
"""Form → what writes it."""
READERS: Mapping[str, type[Reader]] = {
    "bitsandbytes": BitsAndBytesReader, "gptq": GptqReader, "awq": AwqReader,
    "compressed-tensors": CompressedTensorsReader, "surgeon": OwnReader,
}  # fmt: skip
"""`quant_method` of config.json → what reads it."""


def find_writer(form: str, step: Quantiser) -> type[Writer]:
    """The writer of a form; of "" the default one of a quantiser: bitsandbytes for 4-bit books, else surgeon's own.

    Raises:
        UsageError: there is no such form.
    """
    if not form:
        return BitsAndBytesWriter if isinstance(step, Nf4) else OwnWriter
    if form not in WRITERS:
        raise UsageError(f"there is no form '{form}'", "--format", f"nearest: {nearest(form, WRITERS)}")
    return WRITERS[form]


def writer_of(step: Quantiser, dtype: torch.dtype, form: str = "") -> Writer:
    """What writes the codes of a quantiser that is suited to the form, see `find_writer`.

    Raises:
        UsageError: there is no such form.
        UnsupportedError: its codes have no place in it.
    """
    kind = find_writer(form, step)
    kind.suited(step, dtype)
    return kind(step, dtype)
