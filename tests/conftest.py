"""What every test shares: one thread, no network, fixed seeds, and the folder of real models and data."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"

# Read when torch, tokenizers and the hub client are first imported, by this process and by those it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"
os.environ["COLUMNS"] = "160"  # workers are given the width of a terminal that is not there


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the clone."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the clone with `models/` and `data/`; a test that asks for it fails without it."""
    if not (SHARED / "models").is_dir():
        pytest.fail(f"no folder {SHARED}: the real models and data stand beside the clone", pytrace=False)
    return SHARED


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """The same random numbers in every test, alone or in a full run; torch only if the test's file imported it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)
    yield
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
