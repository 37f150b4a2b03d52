"""Milliseconds per token of an encoder-decoder: its export in ONNX Runtime, and transformers with its own cache.

    python -m benchmarks.onnx.encoder_decoder                      # T5-small's shape, random weights, one thread
    python -m benchmarks.onnx.encoder_decoder --sources 64 --tokens 4

`again` is the same decoder with the cache of the encoder's states left empty, so that every call computes their keys
and values: what a decoder without that cache costs. The medians of rounds that take turns.
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
import torch
import transformers

import surgeon
from surgeon.lower.onnx.pair import Pair, open_record
from surgeon.lower.onnx.verify import read_record

SHAPE = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
    "decoder_start_token_id": 0,
}  # fmt: skip
PAST = 16
"""Tokens that the decoder has when the clock starts."""


def ours(pair: Pair, source: list[int], tokens: int, *, again: bool) -> Callable[[], float]:
    """Seconds per token through the export."""
    given = pair.encode([source])
    empty = {name: value for name, value in given.items() if ".encoder." in name}
    _, given = pair.step(np.zeros((1, PAST), np.int64), given)

    def run() -> float:
        state, began = given, time.perf_counter()
        for _ in range(tokens):
            _, state = pair.step(np.zeros((1, 1), np.int64), {**state, **(empty if again else {})})
        return (time.perf_counter() - began) / tokens

    return run


@torch.no_grad()
def theirs(model: Any, source: list[int], tokens: int) -> Callable[[], float]:
    """Seconds per token of transformers' own decoder, with its cache and SDPA."""
    states = model.get_encoder()(torch.tensor([source]))
    first = torch.zeros(1, PAST, dtype=torch.long)

    @torch.no_grad()
    def run() -> float:
        cache = model(encoder_outputs=states, decoder_input_ids=first, use_cache=True).past_key_values
        began = time.perf_counter()
        for _ in range(tokens):
            model(encoder_outputs=states, decoder_input_ids=first[:, :1], past_key_values=cache, use_cache=True)
        return (time.perf_counter() - began) / tokens

    return run


def measured(root: Path, sources: list[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row per length of the source."""
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SHAPE)).eval()
    model.save_pretrained(root / "model")
    surgeon.export(root / "model", root / "onnx", target="onnx")
    pair = open_record(root / "onnx", read_record(root / "onnx"))
    found = []
    for length in sources:
        source = [5 + i % 1000 for i in range(length)]
        runs = {
            "onnx": ours(pair, source, tokens, again=False),
            "again": ours(pair, source, tokens, again=True),
            "transformers": theirs(model, source, tokens),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(run() * 1e3)
        found.append({"source": length} | {name: round(statistics.median(ms), 2) for name, ms in times.items()})
    return found


def main() -> None:
    """Print a row per length, in milliseconds per token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", default="64,512")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        sources = [int(length) for length in given.sources.split(",")]
        for row in measured(Path(place), sources, given.tokens, given.rounds):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
