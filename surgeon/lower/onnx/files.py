"""The files of an export: sizes and sha256, written down and checked later. Needs nothing but Python."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from surgeon.errors import UsageError

MANIFEST, MODEL = "surgeon.json", "model.onnx"
FOLDER = "weights"
"""Where a checkpoint's files are linked: not beside config.json, where they would pass for a checkpoint."""
AGAIN = "copy the whole folder again, its weights included, or export it again"
_BLOCK = 1 << 22


def models(record: Mapping[str, Any]) -> list[str]:
    """The one model of an export, or the two of an encoder-decoder."""
    return [str(record[word]) for word in ("encoder", "model") if word in record] or [MODEL]


def files_of(folder: Path) -> list[Path]:
    """Every file of a folder, in order of the names."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def records(folder: Path, unread: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Name → bytes and sha256 of every file but the manifest; of the `unread` ones the bytes alone."""
    found = {}
    for path in files_of(folder):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            digest = None if name in unread else sha256(path)
            found[name] = {"bytes": path.stat().st_size, "sha256": digest}
    return found


def check_files(folder: Path, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the files of a folder with what was written down.

    Raises:
        UsageError: a file is missing, has another size, or other bytes.
    """
    for name, entry in wanted.items():
        path = folder / name
        if not path.is_file():
            raise UsageError(f"the export lacks {name}", str(folder), AGAIN)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise UsageError(f"{name} has {size:,} of {entry['bytes']:,} bytes", str(path), AGAIN)
    for name, entry in wanted.items():
        if entry["sha256"] and sha256(folder / name) != entry["sha256"]:
            what = f"{name} was changed after the export: its sha256 is not {entry['sha256'][:12]}…"
            raise UsageError(what, str(folder / name), AGAIN)


def sha256(path: Path) -> str:
    """In hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
