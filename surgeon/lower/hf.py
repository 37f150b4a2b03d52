"""A merged Hugging Face checkpoint, streamed: the base's files with some tensors changed.

The model is never built. Files, names and order are the base's; untouched tensors are copied as bytes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon.atomic import atomic_folder, sync
from surgeon.checkpoint import INDEX, PICKLES, SINGLE, Checkpoint
from surgeon.errors import UnsupportedError, UsageError
from surgeon.lower.stream import Buffers, Delta, Entry, WholeDelta, write_entries
from surgeon.safetensors_file import header_bytes

__all__ = ["Delta", "Derived", "MergeReport", "WholeDelta", "write_merged"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHTS = (*PICKLES, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot", ".tflite")
_NOT_COPIED = ("README.md", "config.json", "adapter_config.json")
_FOLDERS = ("additional_chat_templates",)
_REPLACED = ("id2label", "label2id")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Derived:
    """A new tensor made from a stored one, e.g. the head of a pair that was tied: `source` through `delta`."""

    source: str
    delta: Delta | None = None


@dataclass(frozen=True)
class MergeReport:
    """What was written: the folder, its weight files, the changed tensors, bytes copied and changed, seconds."""

    folder: Path
    files: tuple[str, ...]
    merged: tuple[str, ...]
    copied_bytes: int
    merged_bytes: int
    seconds: float


@dataclass
class _File:
    name: str
    header: bytes
    entries: list[Entry]


def write_merged(
    checkpoint: Checkpoint,
    deltas: Mapping[str, Delta],
    out_dir: str | Path,
    *,
    extra_tensors: Mapping[str, torch.Tensor | Derived] | None = None,
    drop: Collection[str] = (),
    config_update: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    check: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Write `checkpoint` with changed tensors to `out_dir`, which appears whole or not at all.

    deltas: stored name → `delta(weight, rows) -> merged` in fp32 (see `surgeon.lower.stream.RowDelta`).
    extra_tensors: new tensors, or other values for stored ones, in a file of their own at the end.
    drop: stored names to leave out. config_update: fields of config.json, merged into nested tables
    (tables of class names are replaced).
    dtype: store floating tensors in this dtype instead of their own.
    progress: called with (name, bytes done, bytes in all). check: runs on the finished temporary folder; what it
    raises is raised, and nothing is left.

    Raises UsageError for unknown names and an output that exists, UnsupportedError for a change of a tensor that is
    not floating point, CheckFailed if merged values are not finite, SurgeonError if the disk is full.
    """
    began = time.perf_counter()
    if Path(out_dir).resolve() == checkpoint.folder.resolve():
        raise UsageError("the output is the base itself", str(out_dir), "name another output folder")
    files = _plan(checkpoint, deltas, extra_tensors or {}, drop, dtype)
    need = sum(len(file.header) + sum(entry.nbytes for entry in file.entries) for file in files)
    with atomic_folder(out_dir, overwrite, need) as folder:
        _stream(files, folder, progress)
        _write_index(checkpoint, files, folder)
        copy_auxiliary(checkpoint, folder, _config_changes(checkpoint, config_update, dtype))
        if check is not None:
            check(folder)
    return _report(Path(out_dir), files, time.perf_counter() - began)


def _plan(
    checkpoint: Checkpoint,
    deltas: Mapping[str, Delta],
    extra: Mapping[str, torch.Tensor | Derived],
    drop: Collection[str],
    dtype: torch.dtype | None,
) -> list[_File]:
    _check_names(checkpoint, deltas, extra, drop)
    files = []
    for shard in checkpoint.shards:
        entries = [
            Entry(info.name, _stored_dtype(info.dtype, dtype), info.shape, info, deltas.get(info.name))
            for info in shard.tensors
            if info.name not in drop and info.name not in extra
        ]
        if dtype is not None:
            entries = _aligned(entries)
        if entries:
            files.append(_File(shard.file.name, _header(entries, shard.metadata), entries))
    if extra:
        entries = _aligned([_extra(checkpoint, name, value, dtype) for name, value in extra.items()])
        files.append(_File("", _header(entries, {}), entries))
        for number, file in enumerate(files, 1):
            file.name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else SINGLE
    return files


def _check_names(
    checkpoint: Checkpoint,
    deltas: Mapping[str, Delta],
    extra: Mapping[str, torch.Tensor | Derived],
    drop: Collection[str],
) -> None:
    for name in (*deltas, *drop):
        checkpoint.info(name)
    where = str(checkpoint.folder)
    for name in deltas:
        if name in drop or name in extra:
            raise UsageError(f"{name} is changed and also left out or replaced", where, "do one of the two")
        if (kind := checkpoint.info(name).dtype) not in FLOATS:
            hint = "merge into the checkpoint it was quantised from"
            raise UnsupportedError(f"{name} is stored as {kind} and cannot be changed", where, hint)


def _extra(checkpoint: Checkpoint, name: str, value: torch.Tensor | Derived, dtype: torch.dtype | None) -> Entry:
    if isinstance(value, torch.Tensor):
        return Entry(name, _stored_dtype(value.dtype, dtype), tuple(value.shape), value)
    info = checkpoint.info(value.source)
    return Entry(name, _stored_dtype(info.dtype, dtype), info.shape, info, value.delta)


def _stored_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own in FLOATS else own


def _aligned(entries: list[Entry]) -> list[Entry]:
    # Readers view the bytes in place: a wide value must not start at an odd place behind a narrow one.
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def _header(entries: list[Entry], metadata: Mapping[str, str]) -> bytes:
    return header_bytes(((entry.name, entry.dtype, entry.shape) for entry in entries), metadata)


def _stream(files: list[_File], folder: Path, progress: Progress | None) -> None:
    total = sum(entry.nbytes for file in files for entry in file.entries)
    done, buffers = 0, Buffers()

    def wrote(entry: Entry, count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(entry.name, done, total)

    # A file is synced while the next one is made: the disk and the processor work at the same time.
    with ThreadPoolExecutor(1) as pool:
        synced: list[Future[None]] = []
        for file in files:
            write_entries(folder / file.name, file.header, file.entries, buffers, wrote)
            synced.append(pool.submit(sync, folder / file.name))
        for future in synced:
            future.result()


def _write_index(checkpoint: Checkpoint, files: list[_File], folder: Path) -> None:
    weight_map = {entry.name: file.name for file in files for entry in file.entries}
    if len(files) == 1 and files[0].name == SINGLE:
        return
    old = checkpoint.folder / INDEX
    index = json.loads(old.read_text()) if old.is_file() else {}
    size = sum(entry.nbytes for file in files for entry in file.entries)
    if index.get("weight_map") == weight_map and size == checkpoint.nbytes:
        shutil.copyfile(old, folder / INDEX)
        return
    # How many parameters there are is no longer known from the base's index.
    metadata = {key: value for key, value in index.get("metadata", {}).items() if key != "total_parameters"}
    write_index(folder, weight_map, {**metadata, "total_size": size})


def write_index(folder: Path, weight_map: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    """The index of a checkpoint in several files: name of a tensor → its file."""
    index = {"metadata": dict(metadata), "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _config_changes(
    checkpoint: Checkpoint, update: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> Mapping[str, Any]:
    if dtype is None:
        return update or {}
    field = "torch_dtype" if "torch_dtype" in checkpoint.config else "dtype"
    return {field: str(dtype).removeprefix("torch."), **(update or {})}


def copy_auxiliary(checkpoint: Checkpoint, folder: Path, changes: Mapping[str, Any]) -> None:
    """Copy config, tokenizer and templates; never weights, hidden files or the base's model card."""
    for entry in sorted(checkpoint.folder.iterdir()):
        hidden = entry.name.startswith(".") or entry.name in _NOT_COPIED
        if hidden or entry.suffix in _WEIGHTS or entry.name.endswith(".index.json"):
            continue
        if entry.is_file():
            shutil.copyfile(entry, folder / entry.name)
        elif entry.name in _FOLDERS:
            shutil.copytree(entry, folder / entry.name)
    if changes:
        text = json.dumps(_updated(checkpoint.config, changes), indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    else:
        shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")


def _updated(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(config)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key not in _REPLACED
        result[key] = _updated(result[key], value) if nested else value
    return result


def _report(folder: Path, files: list[_File], seconds: float) -> MergeReport:
    entries = [entry for file in files for entry in file.entries]
    return MergeReport(
        folder=folder,
        files=tuple(file.name for file in files),
        merged=tuple(entry.name for entry in entries if not entry.raw),
        copied_bytes=sum(entry.nbytes for entry in entries if entry.raw),
        merged_bytes=sum(entry.nbytes for entry in entries if not entry.raw),
        seconds=seconds,
    )
