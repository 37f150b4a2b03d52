"""Tiny models on disk for comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.zoo.folders import folder_of


@pytest.fixture(scope="session")
def tiny() -> Path:
    """A random Llama."""
    return folder_of("llama")
