"""The memory of this process, in bytes."""

from __future__ import annotations

import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """What it holds now; 0 where the system does not say."""
    return _line("VmRSS") or 0


def peak_bytes() -> int:
    """The most it has held.

    Linux keeps getrusage's number across exec: there it would be that of whoever started a small process from a large
    one.
    """
    return _line("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _line(name: str) -> int | None:
    if not _STATUS.is_file():
        return None
    return next((int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(name)), 0)
