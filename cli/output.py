"""What commands print: one JSON object on stdout with `--json`, people's text on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json as jsonlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; people's text stays on stderr.")]
"""The type of every command's `json` option: `json: Json = False`."""

_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")
_stdout: TextIO | None = None


@contextlib.contextmanager
def reserved_stdout() -> Iterator[None]:
    """Within, whatever a library prints goes to stderr; only `emit` and `write` reach stdout."""
    global _stdout
    before, _stdout = _stdout, _stdout or sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout = before


def emit(result: Mapping[str, Any], json: bool, text: RenderableType | None = None) -> None:
    """Print a command's result: one JSON object on stdout with `json`, and people's text on stderr without.

    Args:
        result: what the command found; dataclasses, paths, tuples and numbers of any library are converted.
        json: whether `--json` was given.
        text: what people read instead of `result`; a two-column table of `result` if not given.
    """
    if json:
        write(jsonlib.dumps(plain(result), allow_nan=False, ensure_ascii=False) + "\n")
    else:
        say(fields(result) if text is None else text)


def write(text: str) -> None:
    """Write a command's own product (a generated text, a diff) to stdout, as it is."""
    stream = _stdout or sys.stdout
    stream.write(text)
    stream.flush()


def say(text: RenderableType) -> None:
    """Show people a line, a table or any other rich object, on stderr; `[` in a string is not markup."""
    console().print(text, markup=False, highlight=False)


def console() -> Console:
    """A rich console on the current stderr, for progress bars and the like; `COLUMNS` sets its width."""
    from rich.console import Console

    width = None if sys.stderr.isatty() or "COLUMNS" in os.environ else 120
    return Console(stderr=True, soft_wrap=False, width=width)


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, moved by calling the result with (what, bytes done, bytes in all)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(), transient=True, disable=not console().is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda _, done, total: progress.update(task, completed=done, total=total)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[str] = ()) -> Table:
    """A rich table; columns named in `right` are aligned to the right, cells are shown by `str`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    aligned = set(right)
    out = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        out.add_column(column, justify="right" if column in aligned else "left", overflow="fold")
    for row in rows:
        out.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return out


def fields(result: Mapping[str, Any]) -> Table:
    """A result as a two-column table; nested objects as compact JSON."""
    from rich.table import Table
    from rich.text import Text

    out = Table.grid(padding=(0, 2))
    for key, value in result.items():
        shown = plain(value)
        text = shown if isinstance(shown, str) else jsonlib.dumps(shown, ensure_ascii=False)
        out.add_row(Text(key.replace("_", " "), style="bold"), Text(text))
    return out


def plain(value: Any) -> Any:
    """`value` in JSON's own types; a number that is not finite becomes null, since JSON has no NaN."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, PurePath):
        return str(value)
    if callable(scalar := getattr(value, "tolist", None)):
        return plain(scalar())
    return str(value)


def size(count: float) -> str:
    """A number of bytes for people, in powers of 1000: `13.5 GB`."""
    power = 0
    while abs(count) >= 999.5 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f} {_UNITS[power]}" if power == 0 or count >= 99.95 else f"{count:.1f} {_UNITS[power]}"
