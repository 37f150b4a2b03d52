"""What a process says of its memory."""

from __future__ import annotations

import subprocess
import sys

import torch

from surgeon.resident import peak_bytes, resident_bytes

TOLD = "from surgeon.resident import peak_bytes; print(peak_bytes())"


def test_the_peak_outlives_what_made_it() -> None:
    before = resident_bytes()
    held = torch.ones(32 << 20)  # 128 MiB
    assert resident_bytes() - before > 100e6
    peak = peak_bytes()
    assert peak >= resident_bytes() - 1e6
    del held
    assert peak_bytes() >= peak - 1e6  # the kernel counts in batches


def test_a_small_process_has_not_the_peak_of_a_large_one_that_began_it() -> None:
    held = torch.ones(128 << 20)  # 512 MiB
    told = subprocess.run([sys.executable, "-c", TOLD], check=True, capture_output=True, text=True).stdout
    assert int(told) < held.nbytes
