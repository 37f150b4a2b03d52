"""Decode tokens per second of an artifact on this machine's GPU, beside eager transformers and torch.compile.

    python -m benchmarks.gpu.artifact model/ [--adapter work/] [--batch 1 8] [--tokens 128]

The model is exported for this GPU in bf16 (that needs Triton; running the artifact does not), and each side decodes
greedily after a prompt of 128 tokens. Results go to `benchmarks/gpu/<device>-artifact.json`. 0, with one line, if there
is no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

PROMPT, REPEATS = 128, 3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.artifact", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a checkpoint of a causal language model")
    parser.add_argument("--adapter", type=Path, help="a work folder over it; the artifact is made of this")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU is available: nothing is measured")
        return 0
    rows = measured(given)
    for row in rows:
        print(json.dumps(row))
    device = torch.cuda.get_device_name()
    path = given.out / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-artifact.json"
    path.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return 0


def measured(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of every side at every batch."""
    from surgeon import lower
    from surgeon.artifact.runtime import open_artifact

    major, minor = torch.cuda.get_device_capability()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "artifact")
        source = given.adapter or given.model
        lower.export(source, out, target="triton", arch=[f"sm_{major}{minor}"], precision="bf16")
        artifact = open_artifact(out, "cuda")
        for batch in given.batch:
            ids = torch.randint(3, 1000, (batch, PROMPT)).tolist()
            speed = fastest(functools.partial(artifact.generate, ids), given.tokens, batch)
            rows.append({"side": "artifact", "batch": batch, "tokens_per_second": speed})
    for side in ("eager", "torch.compile"):
        model = reference(given.model, side == "torch.compile")
        for batch in given.batch:
            prompt = torch.randint(3, 1000, (batch, PROMPT), device="cuda")
            speed = fastest(functools.partial(decode, model, prompt), given.tokens, batch)
            rows.append({"side": side, "batch": batch, "tokens_per_second": speed})
        del model
        torch.cuda.empty_cache()
    return rows


def reference(folder: Path, compiled: bool) -> Any:
    """transformers' own model, with a static cache that torch.compile can record."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    if compiled:
        model.generation_config.cache_implementation = "static"
    return model


def decode(model: Any, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip


def fastest(run: Callable[[int], Any], tokens: int, batch: int) -> float:
    """Tokens per second of decoding: what twice as many take longer, the best of some runs after a warm-up."""
    run(8)

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        run(count)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    return max(batch * tokens / (seconds(2 * tokens) - seconds(tokens)) for _ in range(REPEATS))


if __name__ == "__main__":
    raise SystemExit(main())
