"""Tokens per second of an export for ONNX Runtime beside those of optimum's export of the same model, in one run.

    python -m venv /tmp/optimum && /tmp/optimum/bin/pip install torch==2.13.0 "optimum-onnx[onnxruntime]==0.1.0"
    python -m benchmarks.onnx.optimum --optimum /tmp/optimum/bin/python                  # the random model, 9 rounds
    python -m benchmarks.onnx.optimum --optimum /tmp/optimum/bin/python --rounds 2 --layers 2 --hidden 256 --heads 4

optimum-onnx 0.1.0 is for transformers 4, so it exports in an interpreter of its own, in fp32 with a K/V cache; both
exports run here, in one process, on one thread, with the same ONNX Runtime. In each round both decode the same prompt
and take turns of a few tokens, in an order that alternates; a speed is that of the median step, and a ratio the median
of the rounds' ratios. The cache stays with the runtime from step to step, as optimum's own I/O binding keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import surgeon
from benchmarks.onnx.decode import TURN, add_options, beside, random_model
from surgeon.errors import CheckFailed, UsageError

RESULT = Path(__file__).parents[1] / "results" / "onnx_optimum.json"
TASK = "text-generation-with-past"
BOUND = 1e-4
"""|Δlogit| that two exports of one model may have, of the largest logit."""
VERSIONS = """
import importlib.metadata, json
names = ("optimum", "optimum-onnx", "transformers", "torch", "onnx")
print(json.dumps({name: importlib.metadata.version(name) for name in names}))
"""
EXPORT = f"""
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task={TASK!r}, dtype="fp32")
"""


def run_there(python: Path, code: str, *args: object) -> str:
    """What the other interpreter prints; without this one's paths, and without a network."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), "-c", code, *map(str, args)]
    done = subprocess.run(
        command, env=kept | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, check=False
    )
    if done.returncode:
        raise UsageError("optimum did not do it; what it said is above", str(python), "see this file's first lines")
    return done.stdout


class Decoder:
    """An export in ONNX Runtime, on one thread, decoding greedily one token at a time.

    Attributes:
        logits: of the token that was fed last.
        tokens: what was generated.
        seconds: how long each token took.
    """

    def __init__(self, file: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.inputs = [node.name for node in self.session.get_inputs()]

    def start(self, prompt: list[int]) -> None:
        """Read a prompt and choose the token after it."""
        empty = [node for node in self.session.get_inputs() if node.name.startswith("past_")]
        self._past = {node.name: _value(np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)) for node in empty}
        self._length, self.tokens, self.seconds = 0, list[int](), list[float]()
        self._feed(prompt)

    def step(self) -> None:
        """One token."""
        began = time.perf_counter()
        self._feed(self.tokens[-1:])
        self.seconds.append(time.perf_counter() - began)

    def _feed(self, ids: list[int]) -> None:
        self._length += len(ids)
        given = {
            "input_ids": _value(np.array([ids], np.int64)),
            "attention_mask": _value(np.ones((1, self._length), np.int64)),
            "position_ids": _value(np.arange(self._length - len(ids), self._length, dtype=np.int64)[None]),
            **self._past,
        }
        values = self.session.run_with_ort_values(None, {name: given[name] for name in self.inputs})
        found = dict(zip(self.outputs, values, strict=True))
        self._past = {name: found[name.replace("past_key_values", "present")] for name in self._past}
        self.logits = found["logits"].numpy()[0, -1]
        self.tokens.append(int(self.logits.argmax()))


def _value(array: Any) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def in_turns(decoders: Mapping[str, Decoder], names: list[str], prompt: list[int], steps: int) -> dict[str, float]:
    """Tokens per second of the median step of each, in this order."""
    for name in names:
        decoders[name].start(prompt)
    for _ in range(0, steps, TURN):
        for name in names:
            for _ in range(TURN):
                decoders[name].step()
    return {name: 1 / statistics.median(decoders[name].seconds) for name in names}


def difference(decoders: Mapping[str, Decoder], prompt: list[int]) -> float:
    """Largest |Δlogit| after the prompt, of the largest logit; raises CheckFailed if they are two models."""
    for decoder in decoders.values():
        decoder.start(prompt)
    one, other = (decoder.logits for decoder in decoders.values())
    found = float(np.abs(one - other).max() / np.abs(one).max())
    if not found <= BOUND:
        raise CheckFailed(f"the exports differ by {found:.3g} of the largest logit", "", "two models were exported")
    return found


def compared(folders: dict[str, Path], rounds: int, past: int, steps: int) -> dict[str, Any]:
    """Both, alternating."""
    decoders = {name: Decoder(folder / "model.onnx") for name, folder in folders.items()}
    prompt = [3 + 7 * i % 1000 for i in range(past)]
    apart = difference(decoders, prompt)
    speeds: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(-1, rounds):  # the first warms up
        names = sorted(decoders, reverse=number % 2 == 1)
        for name, speed in in_turns(decoders, names, prompt, steps).items():
            speeds[name] += [speed] if number >= 0 else []
    tokens = {name: decoder.tokens for name, decoder in decoders.items()}
    return {**beside(folders, speeds, tokens), "logit_difference": apart}


def main() -> None:
    """Export, decode, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimum", type=Path, required=True, help="an interpreter that has optimum-onnx")
    add_options(parser)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        versions = json.loads(run_there(args.optimum, VERSIONS)) | {"onnxruntime here": onnxruntime.__version__}
        model = random_model(root / "model", args.layers, args.hidden, args.heads, args.vocabulary)
        run_there(args.optimum, EXPORT, model, root / "optimum")
        surgeon.export(model, root / "surgeon", profile="ort")
        folders = {name: root / name for name in ("optimum", "surgeon")}
        options = {k: str(v) for k, v in vars(args).items() if k not in ("out", "optimum")}
        result = compared(folders, args.rounds, args.past, args.steps)
        result = {"options": options, "versions": versions, "fp32": result}
    print(json.dumps(result, indent=2))
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
