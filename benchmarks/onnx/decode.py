"""Tokens per second of an export for ONNX Runtime GenAI beside those of GenAI's own model builder, in one run.

    python -m benchmarks.onnx.decode                      # the random model, 9 rounds
    python -m benchmarks.onnx.decode --rounds 2 --layers 2 --hidden 256 --heads 4 --vocabulary 4096
    python -m benchmarks.onnx.decode --model FOLDER

Both write the same weights, in fp32 and in int4. In each round both decode the same prompt and take turns of a few
tokens, in an order that alternates; a speed is that of the median step, and a ratio the median of the rounds' ratios:
what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgeon

RESULT = Path(__file__).parents[1] / "results" / "onnx_decode.json"
TOKENIZER = Path(__file__).parents[3] / "shared" / "models" / "pystdlib-llama"
PRECISIONS = ("fp32", "int4")
TURN = 8
"""Tokens that a model makes before the other has its turn."""
WEIGHTS = (".onnx", ".data", ".onnx_data", ".safetensors")


def random_model(folder: Path, layers: int, hidden: int, heads: int, vocabulary: int) -> Path:
    """A Llama with grouped queries, and the tokenizer that the builder asks for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def by_builder(model: Path, out: Path, precision: str) -> Path:
    """The builder's export, with its own defaults; what it prints goes to stderr."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", out, "-p", precision]
    subprocess.run([*command, "-e", "cpu", "-c", out.parent / "cache"], check=True, stdout=sys.stderr)
    return out


def by_surgeon(model: Path, out: Path, precision: str) -> Path:
    """Ours."""
    surgeon.export(model, out, profile="genai", precision=precision)
    return out


def opened(folder: Path) -> Any:
    """GenAI's model, on one thread."""
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": 1}}}}))
    return genai.Model(config)


def decoded(models: Sequence[Any], prompt: list[int], steps: int) -> list[tuple[float, list[int]]]:
    """Tokens per second of the median step after the prompt, and the tokens, of models that take turns."""
    generators = [started(model, prompt, steps) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(0, steps, TURN):
        for generator, taken in zip(generators, seconds, strict=True):
            for _ in range(TURN):
                began = time.perf_counter()
                generator.generate_next_token()
                taken.append(time.perf_counter() - began)
    tokens = [[int(token) for token in generator.get_sequence(0)[len(prompt) :]] for generator in generators]
    return [(1 / statistics.median(taken), found) for taken, found in zip(seconds, tokens, strict=True)]


def started(model: Any, prompt: list[int], steps: int) -> Any:
    """A generator that has read the prompt and made one token."""
    params, total = genai.GeneratorParams(model), len(prompt) + steps + TURN + 1
    params.set_search_options(max_length=total, min_length=total, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    generator.generate_next_token()
    return generator


def size(folder: Path) -> int:
    """Bytes of graph and weights, those that are bound among them."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.name.endswith(WEIGHTS))


def compared(folders: dict[str, Path], rounds: int, past: int, steps: int) -> dict[str, Any]:
    """Both, alternating."""
    models = {name: opened(folder) for name, folder in folders.items()}
    prompt = [3 + 7 * i % 1000 for i in range(past)]
    speeds: dict[str, list[float]] = {name: [] for name in models}
    tokens: dict[str, list[int]] = {}
    for number in range(-1, rounds):  # the first warms up
        names = sorted(models, reverse=number % 2 == 1)
        for name, (speed, found) in zip(names, decoded([models[n] for n in names], prompt, steps), strict=True):
            tokens[name] = found
            speeds[name] += [speed] if number >= 0 else []
    return beside(folders, speeds, tokens)


def beside(folders: dict[str, Path], speeds: dict[str, list[float]], tokens: dict[str, list[int]]) -> dict[str, Any]:
    """Speeds of the rounds, sizes and texts of surgeon's export and of a peer's, as a result."""
    (peer,) = folders.keys() - {"surgeon"}
    ratios = [ours / theirs for ours, theirs in zip(speeds["surgeon"], speeds[peer], strict=True)]
    same = [a == b for a, b in zip(tokens["surgeon"], tokens[peer], strict=True)]
    return {
        "tokens_per_second": {name: statistics.median(found) for name, found in speeds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "bytes": {name: size(folder) for name, folder in folders.items()},
        "size_ratio": size(folders["surgeon"]) / size(folders[peer]),
        "same_tokens_until": same.index(False) if False in same else len(same),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The shape of the random model, and how long it decodes."""
    shape = {"layers": 12, "hidden": 640, "heads": 10, "vocabulary": 8192}
    for name, value in (shape | {"rounds": 9, "past": 64, "steps": 64}).items():
        parser.add_argument(f"--{name}", type=int, default=value)


def main() -> None:
    """Export, decode, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    add_options(parser)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        model = args.model or random_model(root / "model", args.layers, args.hidden, args.heads, args.vocabulary)
        result: dict[str, Any] = {"options": {k: str(v) for k, v in vars(args).items() if k != "out"}}
        for precision in PRECISIONS:
            folders = {
                "builder": by_builder(model, root / f"builder-{precision}", precision),
                "surgeon": by_surgeon(model, root / f"surgeon-{precision}", precision),
            }
            result[precision] = compared(folders, args.rounds, args.past, args.steps)
            print(precision, json.dumps(result[precision]), flush=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
