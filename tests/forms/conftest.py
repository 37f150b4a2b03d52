"""Models of one config are captured once: these tests open the same few again and again."""

from __future__ import annotations

from typing import Any

import pytest

from surgeon import source
from surgeon.graph import Graph

_KNOWN: dict[tuple[str, str], Graph] = {}
_CAPTURE = source.capture_config


def _once(config: Any, task: Any) -> Graph:
    written = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    key = (str(sorted(written.items(), key=lambda item: item[0])), task.name)
    if key not in _KNOWN:
        _KNOWN[key] = _CAPTURE(config, task)
    return _KNOWN[key].copy()


@pytest.fixture(autouse=True)
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "capture_config", _once)
