"""What every test shares: one thread, no network, fixed seeds, and the folder of real models and data."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one config and task is captured once in a run, for tests that open the same few again and again."""
    from surgeon import source

    capture = source.capture_config

    def once(config: Any, task: Any) -> Any:
        written = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
        key = (str(sorted(written.items(), key=lambda item: item[0])), task.name)
        if key not in _CAPTURED:
            _CAPTURED[key] = capture(config, task)
        return _CAPTURED[key].copy()

    monkeypatch.setattr(source, "capture_config", once)


_CAPTURED: dict[tuple[str, str], Any] = {}
