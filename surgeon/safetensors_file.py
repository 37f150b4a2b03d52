"""The safetensors format: reading and checking headers, without touching the data.

A file is 8 bytes of header length (little endian), a JSON header `{name: {dtype, shape, data_offsets}}`, then the data
without holes. Source: github.com/huggingface/safetensors, README "Format".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon.errors import UnsupportedError, UsageError

MAX_HEADER = 100_000_000
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
AGAIN = "download the file again, or save the checkpoint again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored: bytes `start` to `stop` (from the beginning of `file`) of `shape` and `dtype`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return self.stop - self.start

    @property
    def dtype_name(self) -> str:
        """The dtype as safetensors writes it, e.g. `BF16`."""
        return NAMES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their data, its metadata, and where the data begins."""

    file: Path
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    data_start: int


def read_shard(file: Path) -> Shard:
    """Parse and check a file's header. Raises UsageError if it is truncated, corrupt, has holes or overlaps."""
    size = file.stat().st_size
    header, data_start = _read_header(file, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UsageError("the header's metadata is not a table", str(file), AGAIN)
    tensors = sorted((_tensor(file, name, entry, data_start) for name, entry in header.items()), key=_place)
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps another tensor" if tensor.start < position else "leaves a hole before it"
            raise UsageError(f"corrupt safetensors file: {tensor.name} {kind}", str(file), AGAIN)
        position = tensor.stop
    if position != size:
        raise UsageError(
            f"truncated safetensors file: {size:,} bytes, its header promises {position:,}"
            if size < position
            else f"corrupt safetensors file: {size - position:,} bytes beyond the last tensor",
            str(file),
            AGAIN,
        )
    return Shard(file, tuple(tensors), metadata, data_start)


def header_bytes(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The length and the header of a file that holds these tensors in this order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, dtype, shape in tensors:
        stop = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _place(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.start, tensor.stop


def _read_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UsageError("truncated safetensors file: its header is not complete", str(file), AGAIN)
        if length > MAX_HEADER:
            raise UsageError(f"corrupt safetensors file: a header of {length:,} bytes", str(file), AGAIN)
        text = stream.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise UsageError("corrupt safetensors file: its header is not JSON", str(file), AGAIN) from error
    if not isinstance(header, dict):
        raise UsageError("corrupt safetensors file: its header is not a table", str(file), AGAIN)
    return header, 8 + length


def _tensor(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        kind, (start, stop) = str(entry["dtype"]), entry["data_offsets"]
        shape = tuple(int(extent) for extent in entry["shape"])
        valid = all(extent >= 0 for extent in shape) and 0 <= int(start) <= int(stop)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"corrupt safetensors file: the entry of {name}", str(file), AGAIN) from error
    if kind not in DTYPES:
        raise UnsupportedError(f"{name} is stored as {kind}", str(file), f"supported: {', '.join(DTYPES)}")
    if not valid or stop - start != math.prod(shape) * DTYPES[kind].itemsize:
        what = f"corrupt safetensors file: {name} is {kind} {list(shape)} in bytes {start} to {stop}"
        raise UsageError(what, str(file), AGAIN)
    return TensorInfo(name, file, DTYPES[kind], shape, data_start + start, data_start + stop)
