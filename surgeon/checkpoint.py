"""A Hugging Face checkpoint folder: checked from its headers, read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from surgeon.errors import UsageError, nearest
from surgeon.safetensors_file import Shard, TensorInfo, read_shard

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SAMPLE_BYTES, SAMPLE_READS = 256, 4096
# What may differ between two copies of the same base: where it lay, who wrote it, in which dtype to load it.
NOT_STRUCTURE = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures", "_commit_hash"}
)


class Checkpoint:
    """A checkpoint folder. `Checkpoint.open(folder)` checks it; tensors are mapped in when they are read.

    `tensors` maps each stored name to its TensorInfo, in file order; `shards` are the files in the index's order.
    """

    def __init__(self, folder: Path, config: dict[str, Any], shards: tuple[Shard, ...]) -> None:
        self.folder, self.config, self.shards = folder, config, shards
        self.tensors: Mapping[str, TensorInfo] = {t.name: t for shard in shards for t in shard.tensors}
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: str | Path, weights: bool = True) -> Checkpoint:
        """Check `folder` without reading tensor data; with `weights=False` config.json is enough.

        Raises UsageError: no folder or config.json, no weights, only pickles, or a shard that is missing, truncated
        or corrupt, or does not hold what the index says.
        """
        folder = Path(folder)
        config = read_config(folder)
        return cls(folder, config, _shards(folder) if weights else ())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """The TensorInfo of `name`. Raises UsageError with the nearest names."""
        if name not in self.tensors:
            raise UsageError(f"no tensor {name}", str(self.folder), f"did you mean {nearest(name, self.tensors)}?")
        return self.tensors[name]

    def read(self, name: str) -> torch.Tensor:
        """The stored tensor, as a private mapping of its file: no copy, and a write to it never reaches the file."""
        info = self.info(name)
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        area = self._map(info.file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            raw = torch.frombuffer(area, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        if info.start % info.dtype.itemsize:
            raw = raw.clone()
        return raw.view(info.dtype).reshape(info.shape)

    def release(self) -> None:
        """Give the mapped pages back to the system (tensors already read stay valid and are mapped in again)."""
        for area in self._maps.values():
            area.madvise(mmap.MADV_DONTNEED)

    def fingerprint(self) -> str:
        """sha256 (hex) that tells this base from another one, in well under a second at any size.

        Covers every tensor's name, dtype and shape, config.json without the fields of `NOT_STRUCTURE`, and up to
        16 samples of 256 bytes spread evenly over each tensor (fewer for more than 256 tensors, at least one).
        Detects: another architecture, size or dtype, another training run or fine-tuning of any tensor (values change
        everywhere), a missing or added tensor. Does not detect: an edit of single values between the samples.
        How the tensors are spread over files does not matter.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        structure = {key: value for key, value in self.config.items() if key not in NOT_STRUCTURE}
        digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
        reads = max(1, min(16, SAMPLE_READS // max(1, len(self.tensors))))
        files = {shard.file: os.open(shard.file, os.O_RDONLY) for shard in self.shards}
        try:
            for handle in files.values():
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
            for name in sorted(self.tensors):
                info = self.tensors[name]
                digest.update(f"\n{name} {info.dtype_name} {list(info.shape)} ".encode())
                for offset in _samples(info.nbytes, reads):
                    size = min(SAMPLE_BYTES, info.nbytes - offset)
                    digest.update(os.pread(files[info.file], size, info.start + offset))
        finally:
            for handle in files.values():
                os.close(handle)
        return digest.hexdigest()

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises UsageError if the folder or the file is missing or unreadable."""
    if not folder.is_dir():
        raise UsageError("no such folder", str(folder), "name a Hugging Face model folder (with config.json)")
    path = folder / "config.json"
    if not path.is_file():
        hint = "name a Hugging Face model folder (with config.json and model.safetensors)"
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter: name its base model, or `surgeon merge` it"
        raise UsageError("the folder has no config.json", str(folder), hint)
    return _read_json(path)


def _shards(folder: Path) -> tuple[Shard, ...]:
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        return (read_shard(folder / SINGLE),)
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES)
    if pickles:
        hint = (
            "convert it where you trust it: AutoModel.from_pretrained(folder).save_pretrained(new_folder) "
            "writes safetensors"
        )
        what = "the weights are a pickle, which can run code and is never loaded"
        raise UsageError(what, str(folder / pickles[0]), hint)
    hint = f"{SINGLE} or {INDEX} is needed beside config.json; of a hub id nothing else is downloaded"
    raise UsageError("the folder has no weights", str(folder), hint)


def _indexed(folder: Path) -> tuple[Shard, ...]:
    path = folder / INDEX
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError("the index has no weight_map", str(path), "download or save the checkpoint again")
    shards = []
    for file in sorted({str(file) for file in weight_map.values()}):
        if not _inside(folder, file):
            what = f"the index names a file outside the folder: {file}"
            raise UsageError(what, str(path), "do not trust this checkpoint")
        if not (folder / file).is_file():
            raise UsageError(f"the index names a missing file: {file}", str(path), "download the missing shard")
        shards.append(read_shard(folder / file))
    _check_index(path, weight_map, shards)
    return tuple(shards)


def _check_index(path: Path, weight_map: Mapping[str, str], shards: list[Shard]) -> None:
    stored = {tensor.name: shard.file.name for shard in shards for tensor in shard.tensors}
    again = "download or save the checkpoint again"
    for name, file in weight_map.items():
        if stored.get(name) != Path(file).name:
            raise UsageError(f"the index says {name} is in {file}, but it is not", str(path), again)
    for name, file in stored.items():
        if name not in weight_map:
            raise UsageError(f"{file} holds {name}, which the index does not name", str(path), again)


def _inside(folder: Path, file: str) -> bool:
    return Path(file).name == file and file not in ("", ".", "..")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path.name} is not valid JSON: {error}", str(path), "download or write it again") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path.name} is not a JSON object", str(path), "download or write it again")
    return value


def _samples(nbytes: int, count: int) -> list[int]:
    last = max(0, nbytes - SAMPLE_BYTES)
    return sorted({last * step // max(1, count - 1) for step in range(count)}) if nbytes else []
