"""How much memory a part of a process takes."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """The largest memory from `begin` on, less what the process had when this was made: bytes, of the GPU if there is.

    Linux can forget a peak; elsewhere the peak is that of the whole process.
    """

    def __init__(self) -> None:
        self.before = _resident()

    def begin(self) -> None:
        """Forget what was before."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            _CLEAR.write_text("5")
        except OSError:
            pass

    def bytes(self) -> int:
        """The peak since."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return max(0, _peak() - self.before)


def _line(name: str) -> int | None:
    if not _STATUS.is_file():
        return None
    return next((int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(name)), 0)


def _resident() -> int:
    return _line("VmRSS") or 0


def _peak() -> int:
    return _line("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
