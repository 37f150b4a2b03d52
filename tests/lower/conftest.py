"""What the tests of lowering share."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import pytest
import transformers

from surgeon.capture import capture_config
from surgeon.graph import Graph


@functools.cache
def captured(written: str, task: Any) -> Graph:
    fields = json.loads(written)
    return capture_config(transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields), task)


@pytest.fixture
def one_capture_per_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of a family differ in their weights alone; capturing has tests of its own."""

    def capture(config: transformers.PretrainedConfig, task: Any = None) -> Graph:
        return dataclasses.replace(captured(config.to_json_string(use_diff=False), task).copy(), config=config)

    monkeypatch.setattr("surgeon.source.capture_config", capture)
