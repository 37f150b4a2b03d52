"""`surgery.json`: what was applied to which base, so that a work folder opens again to the same graph."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from surgeon.checkpoint import Checkpoint
from surgeon.errors import UnsupportedError, UsageError
from surgeon.source import resolve

FILE, SCHEMA = "surgery.json", 1
_BASE = ("path", "relative", "fingerprint", "tensors", "model_type")
AGAIN = "save the work folder again, or take an earlier copy of it"


@dataclass(frozen=True)
class Step:
    """One applied pass: its id in the graph, its name and options, and the folder its tensors are in ("" for none).

    `format` is "peft" or, for methods PEFT does not have, "surgeon".
    """

    id: str
    name: str
    options: dict[str, Any]
    folder: str = ""
    format: str = ""


@dataclass(frozen=True)
class Manifest:
    """A work folder's record.

    Attributes:
        schema: version of this file's layout.
        base: the base's path, absolute and relative to the work folder, its fingerprint, and its model type.
        task: what the base was captured for.
        passes: in the order they were applied.
        graph: sha256 of the rewritten graph's text.
        seed: of the first values.
        versions: of surgeon, torch and transformers, when it was saved.
        probes: `{"prompt": ids, "tokens": greedy continuation}` each.
        labels: names of the classes, where they were chosen for the head of a classifier.
        context: length in tokens the base's positions were scaled to, 0 for its own.
    """

    schema: int
    base: dict[str, str]
    task: str
    passes: tuple[Step, ...]
    graph: str
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    probes: tuple[Mapping[str, Any], ...] = ()
    labels: tuple[str, ...] = ()
    context: int = 0

    def write(self, folder: Path) -> None:
        """Write it into a work folder."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The record of a work folder.

    Raises:
        UsageError: the file is missing, not JSON, or lacks something.
        UnsupportedError: it was written by a newer surgeon.
    """
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"the folder has no {FILE}", str(folder), "name a work folder (from surgeon apply or train)")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{FILE} is not valid JSON: {error}", str(path), AGAIN) from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(schema, int):
        raise UsageError(f"{FILE} has no schema version", str(path), AGAIN)
    if schema > SCHEMA:
        what = f"the work folder has schema {schema}, this surgeon reads up to {SCHEMA}"
        raise UnsupportedError(what, str(path), "update surgeon: pip install -U model-surgeon")
    missing = [name for name in ("base", "task", "passes", "graph") if name not in found]
    if missing:
        raise UsageError(f"{FILE} has no field '{missing[0]}'", str(path), AGAIN)
    known = {entry.name for entry in fields(Manifest)}
    try:
        steps = tuple(Step(**step) for step in found.pop("passes"))
        base = {name: str(found["base"][name]) for name in _BASE}
        del found["base"]
        found["labels"] = tuple(str(name) for name in found.get("labels", ()))
        return Manifest(passes=steps, base=base, **{k: v for k, v in found.items() if k in known})
    except (TypeError, KeyError) as error:
        raise UsageError(f"{FILE} is damaged: {error}", str(path), AGAIN) from error


def describe_base(source: str, folder: Path, model_type: str) -> dict[str, str]:
    """The `base` field for a base and the folder the manifest will lie in."""
    base = Path(source).absolute()
    checkpoint = Checkpoint.open(base)
    return {
        "path": str(base),
        "relative": os.path.relpath(base.resolve(), folder.absolute().resolve()),
        "fingerprint": checkpoint.fingerprint(),
        "tensors": structure(checkpoint),
        "model_type": model_type,
    }


def find_base(manifest: Manifest, folder: Path, given: str | Path | None) -> Path:
    """The base of a work folder: the one given, else by its relative path, else by its absolute one.

    Raises:
        UsageError: there is none, or it is not the one the work folder was made for.
    """
    places = (
        [resolve(given)] if given is not None else [folder / manifest.base["relative"], Path(manifest.base["path"])]
    )
    base = next((place for place in places if place.is_dir()), None)
    if base is None:
        raise UsageError("the base model is not there", str(places[-1]), "name where it is now with --base")
    checkpoint = Checkpoint.open(base)
    if checkpoint.fingerprint() != manifest.base["fingerprint"]:
        same = structure(checkpoint) == manifest.base["tensors"]
        why = "its tensors have other values" if same else "its tensors have other names, dtypes or shapes"
        raise UsageError(
            f"this is not the base that the adapter was made for (fingerprint): {why}", str(base),
            f"name the {manifest.base['model_type']} with fingerprint {manifest.base['fingerprint'][:12]} with --base",
        )  # fmt: skip
    return base


def structure(checkpoint: Checkpoint) -> str:
    """A digest of the names, dtypes and shapes of a checkpoint's tensors."""
    import hashlib

    lines = sorted(f"{info.name} {info.dtype_name} {list(info.shape)}" for info in checkpoint.tensors.values())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of surgeon, torch and transformers."""
    try:
        own = metadata.version("model-surgeon")
    except metadata.PackageNotFoundError:
        own = "unknown (not installed)"
    return {"surgeon": own, "torch": torch.__version__, "transformers": transformers.__version__}


def step_folders(ids: Sequence[str]) -> dict[str, str]:
    """Where each adapter's files lie: one alone at the root, several in a folder each."""
    return {ids[0]: "."} if len(ids) == 1 else {name: name for name in ids}
