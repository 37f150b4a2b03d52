"""Tiny artifacts, exported once: merged, with an adapter beside NF4 codes, and with learned columns."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.graphs import graph_of, randomised
from surgeon import run
from surgeon.graph import Graph
from surgeon.lower.triton import export_triton
from surgeon.passes import make


def adapted(family: str, *steps: tuple[str, dict[str, Any]]) -> Graph:
    """A tiny family with passes applied, their tensors random."""
    graph = run.apply(graph_of(family), *(make(name, **options) for name, options in steps))
    return randomised(graph) if graph.trainable() else graph


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a LoRA folded in."""
    out = tmp_path_factory.mktemp("merged") / "artifact"
    graph = adapted("llama", ("lora", {"rank": 3, "targets": "*.{q,k,v}_proj"}))
    export_triton(graph, out, arch=["sm_80"])
    return out


@pytest.fixture(scope="session")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in NF4 codes with a LoRA beside it, for two architectures."""
    out = tmp_path_factory.mktemp("beside") / "artifact"
    graph = adapted("llama", ("nf4", {}), ("lora", {"rank": 3, "targets": "*.{q,k,v}_proj"}))
    export_triton(graph, out, arch=["sm_80", "sm_90"], precision="bf16", verify=False)
    return out


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of an artifact that a test may damage."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy
