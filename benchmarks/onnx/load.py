"""How an export starts: seconds to load, memory of its own, milliseconds a token; weights copied, bound, prepacked.

    python -m benchmarks.onnx.load                       # 0.49 B parameters, fp32: needs 8 GB of disk
    python -m benchmarks.onnx.load --dtype bfloat16      # the same checkpoint in bf16: weights bound through casts
    python -m benchmarks.onnx.load --tiny --steps 3

Every form is loaded in a process of its own, `--rounds` times in turn; the least time and the median token are shown.
Memory of its own is what no other process can share: anonymous pages. The rest is the files' pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PAST = 64
FORMS = ("copy", "bind", "bind, disable_prepacking", "copy, disable_prepacking", "prepacked")
SHAPES = {"full": (24, 896, 4864, 14, 2, 151_936), "tiny": (2, 64, 128, 4, 2, 512)}


def make(folder: Path, size: str, dtype: str) -> None:
    """A random Qwen2-shaped checkpoint: layers, hidden, inner, heads, K/V heads, vocabulary."""
    import torch
    import transformers

    layers, hidden, inner, heads, shared, vocabulary = SHAPES[size]
    config = transformers.Qwen2Config(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=shared, vocab_size=vocabulary, tie_word_embeddings=True, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


def export(base: Path, root: Path) -> dict[str, dict[str, Any]]:
    """The export of every form; returns what each wrote and took."""
    import surgeon
    from surgeon.lower.onnx.prepack import prepack

    found = {}
    for form in ("copy", "bind"):
        made = surgeon.export(base, root / form, target="onnx", weights=form, verify=False)
        found[form] = {"seconds": round(made.seconds, 1), "written": made.weights.written, "bound": made.weights.bound}
    packed = prepack(root / "bind", root / "prepacked")
    found["prepacked"] = {"seconds": round(packed.seconds, 1), "written": sum(packed.files.values()), "bound": 0}
    return found


def loaded(folder: Path, steps: int, prepacking: bool) -> dict[str, float]:
    """Load in this process and decode; needs onnxruntime and numpy alone."""
    import numpy as np
    import onnxruntime

    from surgeon.lower.onnx.prepack import FAST_START
    from surgeon.lower.onnx.session import empty_cache
    from surgeon.lower.onnx.verify import step_logits

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for key, value in {} if prepacking else FAST_START.items():
        options.add_session_config_entry(key, value)
    before, began = own(), time.perf_counter()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    seconds = time.perf_counter() - began
    ids = np.arange(3, 3 + PAST, dtype=np.int64)[None]
    mask, past, times = np.ones_like(ids), empty_cache(session, 1), list[float]()
    for _ in range(steps + 1):
        began = time.perf_counter()
        logits, past = step_logits(session, ids, mask, past)
        times.append(time.perf_counter() - began)
        ids = logits.argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(ids)], 1)
    return {"load_s": seconds, "own_mb": (own() - before) / 2**20, "decode_ms": statistics.median(times[1:]) * 1e3}


def own() -> int:
    """Anonymous bytes of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("Anonymous:"))) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dtype", default="float32", help="of the checkpoint")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "STEPS", "PREPACKING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(loaded(Path(args.child[0]), int(args.child[1]), args.child[2] == "yes")))
        return
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        make(root / "base", "tiny" if args.tiny else "full", args.dtype)
        made = export(root / "base", root)
        runs: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for form in FORMS * args.rounds:
            child = [sys.executable, "-m", "benchmarks.onnx.load", "--child", str(root / form.partition(",")[0])]
            child += [str(args.steps), "no" if "disable" in form else "yes"]
            done = subprocess.run(child, check=True, capture_output=True, text=True)
            runs[form].append(json.loads(done.stdout.splitlines()[-1]))
    rows = [row(form, made[form.partition(",")[0]], found) for form, found in runs.items()]
    print("| weights | written MB | load s | own MB | decode ms |\n|---|---:|---:|---:|---:|")
    for one in rows:
        print("| {form} | {written_mb:.1f} | {load_s:.2f} | {own_mb:.0f} | {decode_ms:.1f} |".format(**one))
    if args.out:
        args.out.write_text(json.dumps({"dtype": args.dtype, "export": made, "rows": rows}, indent=1) + "\n")


def row(form: str, made: dict[str, Any], found: list[dict[str, float]]) -> dict[str, Any]:
    """One form: the least of every figure over the rounds."""
    least = {key: min(run[key] for run in found) for key in found[0]}
    return {"form": form, "written_mb": made["written"] / 1e6, **least}


if __name__ == "__main__":
    main()
