"""Virtual tokens through ONNX Runtime: every token equal, alone and in a left-padded batch, in both precisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.folders import base_of
from benchmarks.zoo.graphs import randomised
from surgeon import run
from surgeon.lower.onnx.export import export_onnx
from surgeon.passes import make

PREFIX, PROMPT = ("prefix", {"tokens": 3}), ("prompt", {"tokens": 4, "init": "normal"})
GATED = ("prefix", {"tokens": 3, "init": "gated", "windowed": False})
CASES: dict[str, tuple[str, str, list[tuple[str, dict[str, Any]]]]] = {
    "llama-prefix-fp16": ("llama", "fp16", [PREFIX]),
    "gpt2-prompt-fp16": ("gpt2", "fp16", [PROMPT]),
    "gpt2-prefix": ("gpt2", "fp32", [PREFIX]),
    "gemma3-prefix": ("gemma3_text", "fp32", [PREFIX]),
    "gemma3-prompt": ("gemma3_text", "fp32", [PROMPT]),
    "gemma2-gates": ("gemma2", "fp32", [GATED]),
    "opt-prompt": ("opt", "fp32", [PROMPT]),
    "bloom-prompt": ("bloom", "fp32", [PROMPT]),
    "llama-prefix-prompt": ("llama", "fp32", [PREFIX, PROMPT]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_generates_the_same_tokens(case: str, tmp_path: Path) -> None:
    family, precision, steps = CASES[case]
    graph = run.apply(base_of(family)[1], *(make(name, **options) for name, options in steps))
    report = export_onnx(randomised(graph, std=0.5), tmp_path / "onnx", precision=precision)
    assert report.replay is not None
    assert report.token_agreement == 1.0
    assert report.replay.max_error <= report.replay.bound
    assert [len(batch.prompts) for batch in report.replay.batches] == [1, 3]
