"""Training data from files: rows with their place in the file, the form of a row, and batches of samples.

A file is JSONL, JSON (a list of objects), CSV, TSV or Parquet. A row has one of four forms, told by its keys.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgeon.errors import UsageError
from surgeon.loss import IGNORE

FORMS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""The keys a row must have, in order of precedence; `input` (alpaca) and `tools` (chat) may come with them."""
ACCEPTED = "give each row `messages`, or `instruction`, `input`, `output`, or `prompt`, `completion`, or `text`"
MAX_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Row:
    """One record of a data file, without its null fields; `line` counts from 1 (rows, where a file has no lines)."""

    values: Mapping[str, Any]
    file: Path
    line: int

    @property
    def where(self) -> str:
        """The place that an error about this row names."""
        return f"{self.file}:{self.line}"


def load_rows(path: str | Path) -> list[Row]:
    """The rows of one data file.

    Raises UsageError for a missing file, an unknown ending, a row that cannot be read (file and line), no rows.
    """
    file = Path(path)
    reader = _READERS.get(file.suffix.lower())
    if file.is_dir() or not file.exists():
        what = "the data is a folder, a file is needed" if file.is_dir() else "there is no such data file"
        raise UsageError(what, str(file), f"name a file that ends in {', '.join(_READERS)}")
    if reader is None:
        raise UsageError(f"unknown kind of data file `{file.suffix}`", str(file), f"use {', '.join(_READERS)}")
    rows = [_row(values, file, line) for line, values in reader(file)]
    if not rows:
        raise UsageError("the data is empty: no rows", str(file), "give at least one row; " + ACCEPTED)
    return rows


def text_in(row: Row, key: str) -> str:
    """A text of a row. Raises UsageError if it is not one."""
    value = row.values.get(key)
    if not isinstance(value, str):
        what = f"`{key}` is not a string, but a {type(value).__name__}" if value is not None else f"there is no `{key}`"
        raise UsageError(what, row.where, f"make `{key}` a string")
    return value


def cells(row: Row, key: str) -> list[Any]:
    """A list of a row; in a CSV file, where a cell is text, it is written as JSON. Raises UsageError if it is none."""
    value = row.values.get(key)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UsageError(f"`{key}` is not a JSON list: {error}", row.where, 'write ["a", "b"]') from error
    if not isinstance(value, list):
        what = f"`{key}` is not a list, but a {type(value).__name__}" if value is not None else f"there is no `{key}`"
        raise UsageError(what, row.where, f"make `{key}` a list")
    return value


def form_of(row: Row) -> str:
    """The form of a row: `chat`, `alpaca`, `completion` or `text`. Raises UsageError if its keys fit none."""
    for form, keys in FORMS.items():
        if all(key in row.values for key in keys):
            return form
    seen = ", ".join(f"`{key}`" for key in row.values) or "none"
    raise UsageError(f"the keys of this row fit no known form: {seen}", row.where, ACCEPTED)


def _row(values: Any, file: Path, line: int) -> Row:
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise UsageError(f"a row is not an object with keys, but a {kind}", f"{file}:{line}", ACCEPTED)
    return Row({key: value for key, value in values.items() if value is not None}, file, line)


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                hint = "each line must be one whole JSON object, in UTF-8"
                raise UsageError(f"not a line of JSON: {error}", f"{file}:{number}", hint) from error


def _json(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        whole = json.loads(file.read_bytes().decode("utf-8-sig") or "[]")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _json_lines(file)
            return
        hint = "the file must be a JSON list of objects, or one object a line"
        raise UsageError(f"not JSON: {error.msg}", f"{file}:{error.lineno}", hint) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8: {error.reason}", str(file), "save the file as UTF-8") from error
    yield from enumerate(whole if isinstance(whole, list) else [whole], 1)


def _separated(delimiter: str) -> Callable[[Path], Iterator[tuple[int, Any]]]:
    def read(file: Path) -> Iterator[tuple[int, Any]]:
        csv.field_size_limit(MAX_FIELD)
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            try:
                header = next(reader, [])
                for fields in reader:
                    if fields and len(fields) != len(header):
                        what = f"this row has {len(fields)} fields, the header has {len(header)}"
                        raise UsageError(what, f"{file}:{reader.line_num}", "quote fields that hold commas or lines")
                    if fields:
                        yield reader.line_num, dict(zip(header, fields, strict=True))
            except (csv.Error, UnicodeDecodeError) as error:
                hint = "quote fields that hold commas or lines, and save the file as UTF-8"
                raise UsageError(f"cannot be read: {error}", f"{file}:{reader.line_num}", hint) from error

    return read


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowException, OSError) as error:
        hint = "the file may be truncated: copy it again"
        raise UsageError(f"not a Parquet file: {str(error).splitlines()[0]}", str(file), hint) from error
    yield from enumerate(table.to_pylist(), 1)


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}


@dataclass(frozen=True)
class Collator:
    """Batches samples `{input_ids, labels}` into tensors `[b, t]`: ids, attention mask, labels (-100 where padded).

    `side` is where the padding goes; `position_ids` adds positions that count from each sample's first token;
    `multiple_of` rounds t up.
    """

    pad_id: int
    side: str = "right"
    position_ids: bool = False
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise UsageError(f"padding side `{self.side}` is unknown", "Collator", "use `left` or `right`")

    @classmethod
    def of(cls, tokenizer: Any, side: str = "right", position_ids: bool = False) -> Collator:
        """The collator of a tokenizer: its padding token, else its end token, else id 0 (all masked anyway)."""
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(i for i in ids if i is not None), side, position_ids)

    def __call__(self, samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """The batch of `samples`."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = -(-longest // self.multiple_of) * self.multiple_of
        batch = {
            "input_ids": self._padded([s["input_ids"] for s in samples], width, self.pad_id),
            "attention_mask": self._padded([[1] * len(s["input_ids"]) for s in samples], width, 0),
            "labels": self._padded([s["labels"] for s in samples], width, IGNORE),
        }
        if self.position_ids:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_(min=0)
        return batch

    def _padded(self, rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
        padding = [[value] * (width - len(row)) for row in rows]
        pairs = zip(rows, padding, strict=True)
        return torch.tensor([[*pad, *row] if self.side == "left" else [*row, *pad] for row, pad in pairs])
