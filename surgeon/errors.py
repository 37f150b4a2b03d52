"""Errors that people read: what went wrong, where, and what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SurgeonError(Exception):
    """An expected failure, printed as three lines; `exit_code` is the command's exit status."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  try:   {self.hint}")
        return "\n".join(lines)


class CheckFailed(SurgeonError):
    """A measured property does not hold (exit code 1)."""

    exit_code = 1


class UsageError(SurgeonError):
    """The request or its input is wrong (exit code 2)."""

    exit_code = 2


class UnsupportedError(SurgeonError):
    """The model, method or target is not supported (exit code 3)."""

    exit_code = 3


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to `name`, for the last line of an error; all of them if none is close."""
    names = list(dict.fromkeys(known))
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    return ", ".join(close or names[:count])
