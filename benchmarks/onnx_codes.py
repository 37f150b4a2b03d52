"""Decoding with ONNX Runtime over weights in codes: QA-LoRA's merge against plain 4-bit integers, NF4, and no codes.

    OMP_NUM_THREADS=1 python -m benchmarks.onnx_codes                    # about 3 minutes on a quiet core
    python -m benchmarks.onnx_codes --layers 2 --rounds 5 --out /tmp/tried.json

A random Llama (hidden 640, inner 1792, vocabulary 8192) is exported with its linears in several forms, adapters with
random values; one thread decodes one token over 64 past ones. Sides take turns; milliseconds are the median of the
rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgeon
from surgeon.lower.onnx.export import MODEL
from surgeon.lower.to_onnx import export
from surgeon.passes import make

RESULT = Path(__file__).parent / "results" / "onnx_codes.json"
PAST, GROUP = 64, 32


def base(folder: Path, layers: int) -> Path:
    """The random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=640, intermediate_size=1792, num_hidden_layers=layers, num_attention_heads=10,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapted(folder: Path, *steps: Any) -> Any:
    """The model with passes, what trains drawn at random."""
    model: Any = folder
    for step in steps:
        model = surgeon.apply(model, step)
    model = surgeon.load(folder) if model is folder else model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and steps:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def models(folder: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every side: a model, and how it is exported."""
    integer, free = make("intq", group=GROUP, zero="integer"), make("intq", group=GROUP)
    lora, qalora = make("lora", targets="all-linear", rank=16), make("qalora", rank=16)
    return {
        "fp32": (adapted(folder), {}),
        "int4": (adapted(folder, integer), {}),
        "int4, QA-LoRA merged": (adapted(folder, free, qalora), {}),
        "int4, LoRA beside": (adapted(folder, integer, lora), {}),
        "nf4": (adapted(folder, make("nf4")), {}),
        "nf4, MatMulBnb4": (adapted(folder, make("nf4")), {"four_bit": "bnb4"}),
    }


def opened(file: Path) -> Any:
    """A session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def one_token(session: Any) -> dict[str, Any]:
    """Inputs of a step over the past."""
    given: dict[str, Any] = {
        "input_ids": np.array([[7]]), "attention_mask": np.ones((1, PAST + 1), np.int64),
        "position_ids": np.array([[PAST]]),
    }  # fmt: skip
    for one in session.get_inputs():
        if one.name.startswith("past_key_values."):
            given[one.name] = np.zeros((1, one.shape[1], PAST, one.shape[3]), np.float32)
    return given


def measured(sessions: dict[str, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, the sides in turn."""
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sessions}
    for turn in range(rounds + 2):
        for side in sessions if turn % 2 else reversed(sessions):
            given = one_token(sessions[side])
            began, worked = time.perf_counter(), time.process_time()
            sessions[side].run(["logits"], given)
            if turn > 1:
                taken[side].append((time.perf_counter() - began, time.process_time() - worked))
    return {
        side: {
            "ms": 1e3 * statistics.median(t[0] for t in pairs),
            "cpu_ms": 1e3 * statistics.median(t[1] for t in pairs),
        }
        for side, pairs in taken.items()
    }


def main() -> None:
    """Export, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder, sessions = base(Path(place, "base"), options.layers), {}
        for number, (side, (model, form)) in enumerate(models(folder).items()):
            out = Path(place, str(number))
            report = export(model, out, **form)
            operators = [node.op_type for node in ir.load(out / MODEL).graph]
            rows[side] = {"bytes": sum(report.files.values()), "max_error": report.max_error, "bound": report.bound}
            rows[side]["operators"] = {name: operators.count(name) for name in sorted(set(operators)) if "Bits" in name}
            sessions[side] = opened(out / MODEL)
        for side, found in measured(sessions, options.rounds).items():
            rows[side] |= found
    for side, row in rows.items():
        row["cpu / int4"] = row["cpu_ms"] / rows["int4"]["cpu_ms"]
        print(
            f"{side:22s} {row['ms']:7.2f} ms ({row['cpu / int4']:.2f} x int4) {row['bytes'] / 1e6:6.1f} MB", flush=True
        )
    told = {"layers": options.layers, "rounds": options.rounds, "load": round(os.getloadavg()[0], 1)}
    options.out.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
