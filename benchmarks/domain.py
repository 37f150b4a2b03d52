"""The new domain of the benchmarks: C header files, and those held out that no training row repeats."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"
BASE = SHARED / "models/pystdlib-llama"
TRAIN, HELDOUT = (SHARED / f"data/c_headers.{part}.jsonl" for part in ("train", "heldout"))


def unseen(folder: Path) -> Path:
    """A file in `folder` with the held-out rows that are not in the training data too: 44 of the 150 are."""
    known = set(TRAIN.read_text(encoding="utf-8").splitlines())
    rows = [row for row in HELDOUT.read_text(encoding="utf-8").splitlines() if row not in known]
    file = folder / "c_headers.unseen.jsonl"
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return file
