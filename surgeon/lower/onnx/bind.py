"""Where an export's tensors are: bound to the checkpoint's own files, or written into one safetensors file.

ONNX's external data is a file, an offset and a length, and any file will do. A tensor whose bytes are what the graph
reads stays where it is: the checkpoint's file is hard-linked into `weights/` beside the model (runtimes refuse absolute
paths, `..` and symbolic links that leave the folder; the Python packages onnx and onnx_ir also refuse to read hard
links). Linears then read `[out, in]`, as checkpoints hold them. What differs in dtype alone is cast by a node when the
model is loaded; what was merged, joined or quantised is written.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch

from surgeon.coded import stored_infos
from surgeon.errors import UsageError, nearest
from surgeon.fold import MergedValues
from surgeon.graph import Graph
from surgeon.hold import Codes
from surgeon.lower.onnx.files import FOLDER
from surgeon.lower.onnx.own_file import DTYPES, write_own
from surgeon.lower.onnx.profiles import Profile
from surgeon.safetensors_file import TensorInfo

BIND, COPY = "bind", "copy"
FORMS = (BIND, COPY)
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


@dataclass
class Placed:
    """What became of the tensors.

    Attributes:
        form: "bind" or "copy".
        note: why it is that form, or what had to be copied; "" if there is nothing to tell.
        files: name in the export → the checkpoint's file.
        places: (one of those, where a tensor begins) → its bytes.
        written: bytes of those that were written.
    """

    form: str
    note: str = ""
    files: dict[str, Path] = field(default_factory=dict)
    places: dict[tuple[Path, int], int] = field(default_factory=dict)
    written: int = 0

    @property
    def bound(self) -> int:
        """Bytes of the tensors that are read from the checkpoint's files."""
        return sum(self.places.values())


def choose(wanted: str, profile: Profile, graph: Graph, dtype: torch.dtype, parent: Path) -> tuple[str, str]:
    """The form, and why it is that one.

    Args:
        wanted: one of the two, or "" for bind where that is possible and most of the model is the checkpoint's own.
        profile: what the export is made for.
        graph: the graph in its final form.
        dtype: of the export's arithmetic.
        parent: the folder that the export will be in.

    Raises:
        UsageError: there is no such form, or nothing can be bound.
    """
    if wanted and wanted not in FORMS:
        raise UsageError(f"no form of weights {wanted}", "--weights", f"did you mean {nearest(wanted, FORMS)}?")
    if wanted == COPY:
        return COPY, ""
    reason, files = _unbound(profile, graph, dtype)
    if wanted == BIND:
        if reason:
            raise UsageError(f"no weight can be bound: {reason}", "--weights bind", "--weights copy writes them")
        return BIND, ""
    reason = reason or next((why for file in files if (why := _unlinkable(file, parent))), "")
    return (COPY, f"copied: {reason}") if reason else (BIND, "")


def place(models: Sequence[tuple[ir.Model, str]], graph: Graph, folder: Path, form: str, note: str = "") -> Placed:
    """Attach every large tensor of an export's models to bytes in a folder; the rest stays in them.

    Args:
        models: of `surgeon.lower.onnx.model.build`, each with the safetensors file for what is not bound; two may have
            the same.
        graph: what they were built from, without cache.
        folder: that of the export.
        form: as `choose` has it.
        note: as `choose` has it.
    """
    found = Placed(form, note)
    if form == BIND:
        for model, _ in models:
            _bind(model, graph, folder, found)
        _link(found, folder)
    for file in dict.fromkeys(file for _, file in models):
        (folder / file).parent.mkdir(exist_ok=True)
        found.written += write_own([model for model, other in models if other == file], folder / file)
    return found


def _bind(model: ir.Model, graph: Graph, folder: Path, found: Placed) -> None:
    for name, value in list(model.graph.initializers.items()):
        info = stored(graph, name)
        if info is not None and _fits(graph, value, info):
            _attach(model, value, info, f"{FOLDER}/{info.file.name}", folder)
            found.files[f"{FOLDER}/{info.file.name}"] = info.file
            found.places[info.file, info.start] = info.nbytes


def stored(graph: Graph, name: str) -> TensorInfo | None:
    """The checkpoint's tensor that has the bytes of a tensor of the graph, None if they are nowhere."""
    values = graph.values
    while isinstance(values, MergedValues):
        if values.changes(name):
            return None
        values = values.base
    read = graph.inserted.get(name)
    if read is not None:
        if isinstance(read, partial) and isinstance(read.func, Codes):
            weight, part = read.args
            return stored_infos(values, weight).get(part)
        return None
    weights = getattr(values, "weights", None)
    if weights is None or name not in weights or dict.__contains__(values, name):
        return None
    source = weights.direct(name)
    if source is None or source in getattr(weights.checkpoint, "coded", ()):
        return None
    info: TensorInfo = weights.checkpoint.info(source)
    return info if info.dtype == weights.dtype(name) else None


def is_bindable(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a graph in a dtype reads a tensor as it is stored: it is equal, or casting does not make it smaller."""
    if stored == dtype:
        return True
    return stored.is_floating_point and dtype.is_floating_point and stored.itemsize <= dtype.itemsize


def _fits(graph: Graph, value: ir.Value, info: TensorInfo) -> bool:
    kind = value.dtype
    if kind is None or value.const_value is None:
        return False
    if value.name in graph.inserted and kind == ir.DataType.UINT8:
        return value.const_value.nbytes == info.nbytes
    same = tuple(value.const_value.shape.numpy()) == info.shape
    return same and kind in DTYPES.values() and is_bindable(info.dtype, _torch(kind))


def _torch(kind: ir.DataType) -> torch.dtype:
    return next(dtype for dtype, known in DTYPES.items() if known == kind)


def _attach(model: ir.Model, value: ir.Value, info: TensorInfo, location: str, folder: Path) -> None:
    """Make an initialiser read a part of a file, through a cast if it is stored in another dtype."""
    tensor, wanted = value.const_value, value.dtype
    assert tensor is not None
    assert wanted is not None
    codes = wanted == ir.DataType.UINT8
    kind = wanted if codes else DTYPES[info.dtype]
    external = ir.ExternalTensor(
        location, info.start, info.nbytes, kind, shape=ir.Shape(tensor.shape), name=str(value.name), base_dir=folder
    )
    if kind == wanted:
        value.const_value = external
        return
    name = str(value.name)
    source = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(tensor.shape), const_value=external)
    cast = ir.node("Cast", [source], {"to": wanted}, name=f"{name}/Cast")
    cast.outputs[0].name, cast.outputs[0].type = f"{name}/cast", ir.TensorType(wanted)
    value.replace_all_uses_with(cast.outputs[0])
    del model.graph.initializers[name]
    model.graph.insert_before(model.graph[0], cast)
    model.graph.register_initializer(source)


def _unbound(profile: Profile, graph: Graph, dtype: torch.dtype) -> tuple[str, list[Path]]:
    """Why no weight can be bound, or "" and the checkpoint's files."""
    if profile.package == "transformers.js":
        return f"the profile {profile.name} has one file of data beside each model", []
    total, bound, files = 0, 0, dict[Path, None]()
    for name, spec in graph.resident().items():
        info = stored(graph, name) if spec.persistent or spec.owner else None
        total += info.nbytes if info is not None else spec.count * dtype.itemsize
        wide = spec.dtype or dtype
        if info is not None and (is_bindable(info.dtype, wide) or not wide.is_floating_point):
            bound += info.nbytes
            files[info.file] = None
    if not bound:
        return "none is in a checkpoint as the graph reads it", []
    if 2 * bound < total:
        return "most of them are merged or converted, and not the checkpoint's own bytes", list(files)
    return "", list(files)


def _unlinkable(file: Path, parent: Path) -> str:
    """Why a file cannot be hard-linked into a folder that is to be made in `parent`, or ""."""
    there = next(folder for folder in (parent, *parent.parents) if folder.is_dir())
    trial = there / f".surgeon-link-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        os.link(file.resolve(), trial)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        return f"{file.name} cannot be linked to from there ({error.strerror})"
    trial.unlink()
    return ""


def _link(found: Placed, folder: Path) -> None:
    """Hard-link the checkpoint's files; where that is impossible copy them, and say so."""
    copied = list(_linked(found, folder))
    if copied:
        size = sum((folder / name).stat().st_size for name in copied)
        found.written += size
        found.note = f"{len(copied)} files of the checkpoint were copied ({size:,} bytes): they cannot be linked to"


def _linked(found: Placed, folder: Path) -> Iterator[str]:
    if found.files:
        (folder / FOLDER).mkdir()
    for name, file in found.files.items():
        try:
            os.link(file.resolve(), folder / name)  # of a download, the blob that the cache's link points to
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            shutil.copyfile(file, folder / name)
            yield name
