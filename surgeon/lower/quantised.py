"""A checkpoint whose linears are quantised, streamed: one weight in memory at a time, whatever the model's size.

How codes lie in a file is a form's (`surgeon.forms`): bitsandbytes, GPTQ, compressed-tensors, or surgeon's own.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon.atomic import atomic_folder, sync
from surgeon.checkpoint import SINGLE
from surgeon.coded import CodedCheckpoint
from surgeon.errors import UnsupportedError, UsageError
from surgeon.fold import MergedValues, value_of
from surgeon.forms import Layout
from surgeon.graph import Graph
from surgeon.hold import holders
from surgeon.lower.hf import copy_auxiliary, write_index
from surgeon.lower.saved import Saved
from surgeon.safetensors_file import TensorInfo, header_bytes
from surgeon.source import Source, Values


@dataclass(frozen=True)
class Written:
    """What was written: the folder, the weights that are in codes, bytes of all tensors."""

    folder: Path
    quantised: tuple[str, ...]
    nbytes: int
    form: str = ""


def write_quantised(
    graph: Graph,
    source: Source,
    out: str | Path,
    *,
    form: str = "",
    overwrite: bool = False,
    weights: Mapping[str, torch.Tensor] | None = None,
    config_update: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    check: Callable[[Path], None] = lambda folder: None,
) -> Written:
    """Write the base of `graph` with the weights that are held in codes as those codes.

    Over a checkpoint that was saved quantised a graph that holds nothing in codes any more gives a plain one.

    Args:
        graph: a graph over the weights of `source` with one quantiser, and no adapter.
        source: the base.
        out: the new folder.
        form: of the codes, see `surgeon.forms`.
        overwrite: replace an existing folder.
        weights: the base's own values, where those of `graph` are others: what differs is written as it is in `graph`.
        config_update: fields of config.json that are others than the base's.
        progress: called with (tensor, bytes done, bytes in all).
        check: called with the whole folder before it gets its name.

    Raises:
        UsageError: nothing is quantised, something else is applied, or a weight is not finite.
        UnsupportedError: a quantised weight is stored in several parts, or has no place in the form.
    """
    saved = Saved(graph, form) if holders(graph) else None
    if saved is None and not isinstance(source.checkpoint, CodedCheckpoint):
        raise UsageError("nothing is quantised", graph.source, "apply one of nf4, intq")
    own = graph.values if weights is None else weights
    held, changed = _stored_names(graph, source, own)
    shards = [
        (shard, [entry for info in _tensors_in(source, shard.file) for entry in _layouts(info, saved, held)])
        for shard in source.checkpoint.shards
    ]
    total = sum(_size(entry) for _, entries in shards for entry in entries)
    done = 0
    weight_map: dict[str, str] = {}
    with atomic_folder(out, overwrite, total) as folder:
        for shard, entries in shards:
            file = folder / shard.file.name
            with _Writer(file, entries, shard.metadata) as writer:
                for info in _tensors_in(source, shard.file):
                    for name, tensor in _tensors(info.name, saved, held, changed, source).items():
                        writer.put(name, tensor)
                        done += tensor.nbytes
                        weight_map[name] = file.name
                    source.checkpoint.release()
                    if progress is not None:
                        progress(info.name, done, total)
            sync(file)
        if len(shards) > 1 or shards[0][0].file.name != SINGLE:
            write_index(folder, weight_map, {"total_size": total})
        codes = {"quantization_config": saved.config()} if saved is not None else {}
        copy_auxiliary(source.checkpoint, folder, {**source.checkpoint.config, **(config_update or {}), **codes})
        check(folder)
    return Written(Path(out), tuple(held.values()), total, saved.writer.name if saved is not None else "")


def _stored_names(
    graph: Graph, source: Source, own: Mapping[str, torch.Tensor]
) -> tuple[dict[str, str], dict[str, Callable[[], torch.Tensor]]]:
    """Stored name → name in the model, of the held weights; and → value, of what else is not the base's."""
    if not isinstance(own, Values):
        raise UnsupportedError("the graph was not read from a checkpoint", graph.source, "open it with surgeon.load")
    held: dict[str, str] = {}
    changed: dict[str, Callable[[], torch.Tensor]] = {}
    for name, spec in graph.tensors.items():
        differs = name in graph.inserted or (isinstance(graph.values, MergedValues) and graph.values.changes(name))
        if spec.owner or not spec.persistent or not (spec.held or differs):
            continue
        stored = own.weights.direct(name)
        if stored is None:
            what = f"{name} is stored in parts or not at all, and cannot be written by itself"
            raise UnsupportedError(what, str(source.folder), "leave it out with --exclude")
        if spec.held is not None:
            held[stored] = name
        else:
            changed[stored] = functools.partial(value_of, graph, name)
    return held, changed


def _tensors_in(source: Source, file: Path) -> list[TensorInfo]:
    return [info for info in source.checkpoint.tensors.values() if info.file == file]


def _layouts(info: TensorInfo, saved: Saved | None, held: Mapping[str, str]) -> list[Layout]:
    if saved is not None and info.name in held:
        return saved.layouts(info.name, held[info.name])
    return [(info.name, info.dtype, info.shape)]


def _tensors(
    stored: str,
    saved: Saved | None,
    held: Mapping[str, str],
    changed: Mapping[str, Callable[[], torch.Tensor]],
    source: Source,
) -> Mapping[str, torch.Tensor]:
    if saved is not None and stored in held:
        return saved.tensors(stored, held[stored])
    if stored in changed:
        return {stored: changed[stored]().to(source.checkpoint.info(stored).dtype)}
    return {stored: source.checkpoint.read(stored)}


def _size(entry: Layout) -> int:
    return math.prod(entry[2]) * entry[1].itemsize


class _Writer:
    """A safetensors file whose tensors come in any order; wide ones lie first, so that all are aligned."""

    def __init__(self, file: Path, entries: list[Layout], metadata: Mapping[str, str]) -> None:
        placed = sorted(entries, key=lambda entry: -entry[1].itemsize)
        header = header_bytes(placed, metadata)
        self.file, self.header, self.place, position = file, header, {}, len(header)
        for entry in placed:
            self.place[entry[0]] = (position, _size(entry))
            position += _size(entry)

    def __enter__(self) -> _Writer:
        self.handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write(memoryview(self.header), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor where it belongs."""
        offset, size = self.place[name]
        if tensor.nbytes != size:
            raise UsageError(f"{name} takes {tensor.nbytes} bytes, not {size}", str(self.file), "report this")
        self._write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, offset)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self.handle, data, offset)
            data, offset = data[count:], offset + count
