"""What a comparison is about, and whether its data can carry one."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgeon.data import Row, load_rows
from surgeon.errors import UsageError

SETTINGS = "settings.json"
VALIDATION = 64
"""Rows of the training data, drawn at random, that the search for a learning rate is judged by: at most a tenth."""


@dataclass(frozen=True)
class Settings:
    """Equal for every method.

    Attributes:
        model: folder or hub id.
        data: to train on.
        heldout: to measure on.
        task: of the model.
        steps: of a run.
        search_steps: of a run of the search for a learning rate.
        batch_size: samples of a step.
        max_length: tokens of a sample.
        onnx: whether the loss after the export is measured.
    """

    model: str
    data: str
    heldout: str
    task: str
    steps: int
    search_steps: int
    batch_size: int = 8
    max_length: int = 256
    onnx: bool = True

    def same_as(self, other: Settings) -> str:
        """The first field in which two comparisons differ, or ""."""
        mine, theirs = asdict(self), asdict(other)
        return next((name for name in mine if mine[name] != theirs[name]), "")


def read(folder: Path) -> Settings | None:
    """The settings of a folder of results, None if it has none.

    Raises:
        UsageError: they are damaged.
    """
    file = folder / SETTINGS
    if not file.is_file():
        return None
    try:
        return Settings(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"the settings cannot be read: {error}", str(file), "name another folder with -o") from error


def write(settings: Settings, folder: Path) -> None:
    """Keep the settings beside the results."""
    from surgeon.atomic import atomic_file

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / SETTINGS) as new:
        new.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def checked_data(data: str | Path, heldout: str | Path, batch_size: int) -> tuple[list[Row], list[Row]]:
    """The rows of both files.

    Raises:
        UsageError: a file cannot be read, has fewer rows than a batch, or both have a row.
    """
    rows, held = load_rows(data), load_rows(heldout)
    if len(rows) < batch_size:
        what = f"the training data has {len(rows)} rows, fewer than a batch of {batch_size}"
        raise UsageError(what, str(data), "give more rows, or a smaller --batch-size")
    known = set(map(_canonical, rows))
    both = sum(_canonical(row) in known for row in held)
    if both:
        what = f"{both} of the {len(held)} held-out rows are in the training data too"
        raise UsageError(what, f"{heldout} and {data}", "take them out of one of the files")
    return rows, held


def _canonical(row: Row) -> str:
    values: dict[str, Any] = dict(row.values)
    return json.dumps(values, sort_keys=True, default=str)


def validation_of(rows: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Rows that the search trains on, and those that it is judged by: from all of a file, which may be sorted."""
    chosen = set(random.Random(0).sample(range(len(rows)), max(1, min(VALIDATION, len(rows) // 10))))
    trained = [row for place, row in enumerate(rows) if place not in chosen]
    return trained, [rows[place] for place in sorted(chosen)]


def seconds(text: str) -> float:
    """The seconds of `10m`, `2h`, `90s` or `600`.

    Raises:
        UsageError: it is written otherwise, or is not above 0.
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        found = float(number) * units[unit]
    except ValueError:
        found = 0.0
    if not found > 0:
        raise UsageError(f"'{text}' is no time", "--budget", "for example 90s, 10m or 2h")
    return found
