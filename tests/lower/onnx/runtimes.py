"""Greedy decoding of an export by each runtime that its profiles are for, as a user of that runtime does it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai

from surgeon.lower.onnx.session import left_padded, numbered

TRANSFORMERS_JS = "@huggingface/transformers@4.3.1"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
"""OpenVINO's default precision on CPUs with half-precision arithmetic is off by 3e-3."""


def by_genai(
    model: onnxruntime_genai.Model,
    prompt: list[int],
    steps: int,
    adapters: onnxruntime_genai.Adapters | None = None,
    name: str = "",
) -> list[int]:
    """What ONNX Runtime GenAI generates, the end of the text being no end, with the adapter of that name."""
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + steps, min_length=len(prompt) + steps)
    generator = onnxruntime_genai.Generator(model, params)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def by_openvino(model: Any, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens of a batch padded on the left, and their logits, through the cache of a compiled model."""
    ids, mask = left_padded(prompts)
    sizes = {
        node.any_name: [size.get_length() if size.is_static else 0 for size in node.partial_shape]
        for node in model.inputs
    }
    past = {name: np.zeros((len(ids), *sizes[name][1:]), np.float32) for name in sizes if name.startswith("past_")}
    tokens, best = [], []
    for _ in range(steps):
        places = numbered(mask)[:, -ids.shape[1] :]
        found = model({"input_ids": ids, "attention_mask": mask, "position_ids": places, **past})
        logits = found["logits"][:, -1]
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        ids = logits.argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
        tokens.append(ids[:, 0])
        best.append(logits.max(-1))
    return np.stack(tokens, 1).tolist(), np.stack(best, 1).tolist()


def by_transformers_js(folder: Path, place: Path, text: str, steps: int) -> tuple[list[int], str]:
    """What transformers.js generates in node, as tokens and as text; npm puts it into the folder `place`."""
    npm(place, TRANSFORMERS_JS)
    found = json.loads(node("generate.mjs", place, folder, text, steps)[-1])
    return found["tokens"], found["text"]


def npm(place: Path, package: str) -> None:
    """Install a package, without what it would run and without the binaries for GPUs that it would fetch."""
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", package]
    subprocess.run(command, cwd=place, check=True, capture_output=True, timeout=400)


def node(script: str, place: Path, *args: object) -> list[str]:
    """The lines that a script of this folder prints, run where its packages are."""
    command = ["node", str(Path(__file__).with_name(script)), *map(str, args)]
    done = subprocess.run(command, cwd=place, check=False, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
