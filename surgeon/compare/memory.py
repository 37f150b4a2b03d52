"""How much memory a part of a process takes."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from surgeon.resident import peak_bytes, resident_bytes

_CLEAR = Path("/proc/self/clear_refs")


class Peak:
    """The largest memory from `begin` on, less what the process had when this was made: bytes, of the GPU if there is.

    Linux can forget a peak; elsewhere the peak is that of the whole process.
    """

    def __init__(self) -> None:
        self.before = resident_bytes()

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
        return max(0, peak_bytes() - self.before)
