"""What the tests of several commands start from: a tiny model, and the first rows of the shared data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of two layers, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a command that has to succeed, with --json; gives what it says."""
    from surgeon.cli.main import main

    def answer(*args: object) -> dict[str, Any]:
        code = main([*map(str, args), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return answer


@pytest.fixture(scope="session")
def c_headers(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A file with the first so many rows of "train" or "heldout"."""

    def rows(part: str, count: int) -> Path:
        lines = (shared / f"data/c_headers.{part}.jsonl").read_text().splitlines()[:count]
        path = tmp_path_factory.mktemp("data") / f"{part}.jsonl"
        path.write_text("\n".join(lines))
        return path

    return rows
