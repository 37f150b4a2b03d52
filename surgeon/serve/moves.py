"""Reading thousands of adapters of one kind: what the first ones taught, done again by copies.

An adapter comes into the pool through the graph: its config is applied, its tensors find their sites, their normal
form is packed. Where that does nothing but move numbers, as for every LoRA, the moves are the same for all adapters of
one config whose files begin with the same header. They are found by packing random numbers and looking where these
went; where a number went nowhere, or was computed with (DoRA's norms, AdaLoRA's values), there are no moves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from surgeon.safetensors_file import Shard
from surgeon.serve.packed import Packed

LARGEST = 1 << 22
"""Bytes of a header."""


@dataclass(frozen=True)
class Move:
    """One tensor of a file becomes rows.

    Attributes:
        start: of its numbers in the file's data.
        shape: of the tensor; of a vector `(1, n)`.
        width: of the rows.
        first: of them among those of their width.
        turned: whether they are those of its transpose.
    """

    start: int
    shape: tuple[int, int]
    width: int
    first: int
    turned: bool


@dataclass(frozen=True)
class Moves:
    """All of them for one kind of adapter.

    Attributes:
        like: an adapter of that kind without its rows.
        counts: width → rows, widest first.
        dtype: of the numbers in the file, and of the rows.
        data_start: where the file's numbers begin, in bytes.
        numbers: how many there are.
    """

    like: Packed
    counts: Mapping[int, int]
    dtype: tuple[torch.dtype, torch.dtype]
    data_start: int
    numbers: int
    moves: tuple[Move, ...]

    def read(self, file: Path, start: bytes, key: str) -> Packed | None:
        """The adapter of a file with the same header; None if it is not whole or not finite, which others explain."""
        stored, dtype = self.dtype
        size = file.stat().st_size
        if size != self.data_start + self.numbers * stored.itemsize:
            return None
        data = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        if data[8 : self.data_start].numpy().tobytes() != start:  # another file has come in its place
            return None
        numbers = data[self.data_start :].view(stored)
        if not math.isfinite(numbers.sum(dtype=torch.float32).item()):  # no sum of others hides a NaN or Inf
            return None
        rows = {width: torch.empty(count, width, dtype=dtype) for width, count in self.counts.items()}
        for move in self.moves:
            tensor = numbers[move.start : move.start + move.shape[0] * move.shape[1]].view(move.shape)
            tensor = tensor.T if move.turned else tensor
            rows[move.width][move.first : move.first + len(tensor)] = tensor
        return dataclasses.replace(self.like, key=key, rows=rows)


def start_of(file: Path) -> bytes:
    """The header of a file as it is written, or nothing where there is none of a common size."""
    if not file.is_file():
        return b""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return stream.read(length) if length <= LARGEST else b""


def random_tensors(shard: Shard) -> dict[str, torch.Tensor]:
    """Numbers that differ, in the place of a file's."""
    generator = torch.Generator().manual_seed(0)
    return {info.name: torch.randn(info.shape, generator=generator) for info in shard.tensors}


def found(packed: Packed, shard: Shard, tensors: Mapping[str, torch.Tensor]) -> Moves | None:
    """What became of the tensors of a file in an adapter that was packed of them; None where it is not moves alone."""
    stored = {info.dtype for info in shard.tensors}
    if packed.bank or packed.columns or packed.whole or len(stored) != 1 or not stored <= set(_FLOATS):
        return None
    (kind,) = stored
    if shard.data_start % kind.itemsize:
        return None
    places: dict[tuple[int, float], list[int]] = {}
    for width, rows in packed.rows.items():
        for place, number in enumerate(rows[:, 0].tolist()):
            places.setdefault((width, number), []).append(place)
    moves, covered = [], dict.fromkeys(packed.rows, 0)
    for info in shard.tensors:
        move = _move(packed, tensors[info.name], (info.start - shard.data_start) // kind.itemsize, places)
        if move is None:
            return None
        covered[move.width] += move.shape[1] if move.turned else move.shape[0]
        moves.append(move)
    counts = dict(packed.widths)
    if covered != counts:
        return None
    dtypes = kind, next(iter(packed.rows.values())).dtype
    numbers = sum(move.shape[0] * move.shape[1] for move in moves)
    return Moves(dataclasses.replace(packed, rows={}), counts, dtypes, shard.data_start, numbers, tuple(moves))


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _move(
    packed: Packed, tensor: torch.Tensor, start: int, places: Mapping[tuple[int, float], list[int]]
) -> Move | None:
    """Where a tensor went, whole."""
    if tensor.dim() not in (1, 2) or not tensor.numel():
        return None
    matrix = tensor.reshape(1, -1) if tensor.dim() == 1 else tensor
    for turned, rows in ((False, matrix), (True, matrix.T)):
        width = rows.shape[1]
        if width not in packed.rows:
            continue
        kept = rows.to(packed.rows[width].dtype)
        for first in places.get((width, float(kept[0, 0])), ()):
            if torch.equal(packed.rows[width][first : first + len(kept)], kept):
                return Move(start, (matrix.shape[0], matrix.shape[1]), width, first, turned)
    return None
