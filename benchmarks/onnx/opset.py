"""Milliseconds per token of one model with its attention written three ways, in ONNX Runtime.

    python -m benchmarks.onnx.opset                            # a random Llama of 2 layers, fp32, one thread
    python -m benchmarks.onnx.opset --precision int4 --past 64 --rounds 3

`standard` is opset 21 with attention in standard operators, `fused` opset 23, `gqa` opset 21 with GroupQueryAttention.
Medians of rounds that take turns, a step of one token over a past of so many; and how many operators each graph has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers

import surgeon
from surgeon.lower.onnx.session import open_session

SHAPE = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "standard": {"profile": "ort", "prefix_slots": True},
    "fused": {"profile": "ort", "opset": 23},
    "gqa": {"profile": "ort"},
}


def step(file: Path, past: int, repeats: int) -> Callable[[], float]:
    """Milliseconds of one token."""
    session = open_session(file)
    feed: dict[str, Any] = {
        "input_ids": np.array([[7]], np.int64),
        "attention_mask": np.ones((1, past + 1), np.int64),
        "position_ids": np.array([[past]], np.int64),
    }
    generator = np.random.default_rng(0)
    for node in session.get_inputs():
        if node.name.startswith("past_key_values."):
            feed[node.name] = generator.standard_normal((1, node.shape[1], past, node.shape[3]), np.float32)
    given = {node.name: feed[node.name] for node in session.get_inputs()}

    def run() -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            session.run(None, given)
        return (time.perf_counter() - began) / repeats * 1e3

    return run


def measured(root: Path, precision: str, pasts: list[int], rounds: int, repeats: int) -> list[dict[str, Any]]:
    """A row of the numbers of operators, and one per length of the past."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(root / "model")
    for name, options in FORMS.items():
        options = {**options, "precision": precision, "weights": "copy"}
        surgeon.export(root / "model", root / name, target="onnx", **options)
    files = {name: root / name / "model.onnx" for name in FORMS}
    rows: list[dict[str, Any]] = [{"operators": {name: len(list(ir.load(file).graph)) for name, file in files.items()}}]
    for past in pasts:
        runs = {name: step(file, past, repeats) for name, file in files.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()  # the first runs find their memory
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(run())
        rows.append({"past": past} | {name: round(statistics.median(ms), 3) for name, ms in times.items()})
    return rows


def main() -> None:
    """Print a row per length, in milliseconds per token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--past", default="16,256,1024")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=50)
    given = parser.parse_args()
    pasts = [int(length) for length in given.past.split(",")]
    with tempfile.TemporaryDirectory() as place:
        for row in measured(Path(place), given.precision, pasts, given.rounds, given.repeats):
            print(json.dumps({"precision": given.precision} | row), flush=True)


if __name__ == "__main__":
    main()
