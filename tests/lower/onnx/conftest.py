"""An export whose weights are bound to a download's own files, made once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from benchmarks.zoo.folders import folder_of
from surgeon.checkpoint import Checkpoint
from surgeon.graph import structure
from surgeon.lower.onnx import export, model, proof
from surgeon.lower.onnx.files import FOLDER
from surgeon.source import open_graph, open_source


def cached(folder: Path, root: Path) -> Path:
    """A folder as a download lies in the hub's cache: links into a folder of blobs beside it."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


@dataclass(frozen=True)
class Bound:
    """An export of a cached download, the folder it was made from, and what was read before the replay."""

    report: export.OnnxReport
    snapshot: Path
    before: list[str]


@pytest.fixture(scope="session")
def bound(tmp_path_factory: pytest.TempPathFactory) -> Bound:
    root = tmp_path_factory.mktemp("bound")
    snapshot = cached(folder_of("llama"), root / "models--tiny--llama")
    graph = open_graph(open_source(snapshot))
    reads: list[str] = []
    before: list[str] = []
    read, replay = Checkpoint.read, proof.replay

    def counted(self: Checkpoint, name: str) -> torch.Tensor:
        reads.append(name)
        return read(self, name)

    def replayed(*args: Any, **options: Any) -> Any:
        before.extend(reads)
        return replay(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", counted)
        patch.setattr(proof, "replay", replayed)
        return Bound(export.export_onnx(graph, root / "onnx"), snapshot, before)


@pytest.fixture(scope="module")
def lowered_once() -> Iterator[None]:
    """Parts that are the same in several exports of a file are lowered once: only their tensors' values differ."""
    lower, known = model.lower_part, dict[object, Any]()

    def remembered(part: fx.Graph, first: Any, second: Any, opset: int) -> Any:
        sizes = tuple((v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for v in (*first, *second))
        key = (structure(part), sizes, opset)
        if key not in known:
            known[key] = lower(part, first, second, opset)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "lower_part", remembered)
        yield


def traces(folder: Path) -> list[str]:
    """Files of an export that tell where or by which source it was made; its weights and its words are the model's."""
    words = (b"/home", b"/tmp", b"site-packages", b".py", str(Path.cwd()).encode(), str(folder.parent).encode())
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != FOLDER]
    files = [path for path in files if not path.name.startswith("tokenizer")]
    return [f"{word!r} in {path.name}" for path in files for word in words if word in path.read_bytes()]
