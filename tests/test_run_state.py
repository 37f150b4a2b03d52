"""The state of a run comes back from safetensors and JSON as it was written."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch

from surgeon import run_state
from surgeon.errors import SurgeonError, UsageError


def test_trees_come_back_as_they_were(tmp_path: Path) -> None:
    shared_memory = torch.arange(4.0)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "half": shared_memory[::2]}, 1: shared_memory},
        "betas": (0.9, 0.999),
        "nested": [(1, [None, True, "é", float("inf")])],
        "$odd": {},
    }
    run_state.save_tree(tree, tmp_path, "tree")
    assert str(run_state.load_tree(tmp_path, "tree")) == str(tree)
    with pytest.raises(SurgeonError, match="a set cannot be saved"):
        run_state.save_tree({"a": {1, 2}}, tmp_path, "other")
    (tmp_path / "tree.json").write_text("{")
    with pytest.raises(UsageError, match="tree is missing or corrupt"):
        run_state.load_tree(tmp_path, "tree")


def test_random_numbers_continue(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.gauss(0, 1), numpy.random.normal(), torch.rand(()).item(), torch.randn(()).item()

    draw()
    run_state.save_tree(run_state.random_state(), tmp_path, "random")
    drawn = [draw() for _ in range(3)]
    run_state.restore_random_state(run_state.load_tree(tmp_path, "random"))
    assert [draw() for _ in range(3)] == drawn
