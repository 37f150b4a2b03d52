"""Time, memory and bytes of an export beside torch's own exporter, on a random Qwen2 of 0.5 B parameters.

    python -m benchmarks.onnx.export_speed                # two rounds, alternating
    python -m benchmarks.onnx.export_speed --rounds 1 --layers 2 --hidden 128 --vocabulary 512

Each export is a process of its own, measured from the checkpoint on disk to the last byte written, imports left out of
the time and counted in the memory. torch's gets a wrapper with a flat K/V cache, as one writes it by hand, and saves
its weights; ours binds them. Neither is verified.
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
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parents[1] / "results" / "onnx_export_speed.json"
WAYS = ("surgeon", "torch")


def random_model(folder: Path, layers: int, hidden: int, vocabulary: int) -> Path:
    """The checkpoint."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 38 // 7 // 64 * 64,
        num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 448),
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def by_surgeon(model: Path, out: Path) -> None:
    """Ours."""
    from surgeon.lower.onnx.export import export_onnx
    from surgeon.lower.opening import opened

    graph, tokenizer = opened(model, None, None)
    export_onnx(graph, out, tokenizer=tokenizer, weights="bind", verify=False)


def by_torch(model: Path, out: Path) -> None:
    """torch.onnx.export of a wrapper."""
    import torch
    from torch.export import Dim
    from transformers import AutoModelForCausalLM, DynamicCache

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa").eval()

        def forward(self, ids: Any, mask: Any, places: Any, past: list[Any]) -> Any:
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            found = self.model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
            flat = [part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)]
            return found.logits, *flat

    whole = Flat()
    config = whole.model.config
    size = config.hidden_size // config.num_attention_heads
    past = [torch.zeros(2, config.num_key_value_heads, 4, size) for _ in range(2 * config.num_hidden_layers)]
    given = (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 7, dtype=torch.long), torch.ones(2, 3).long(), past)
    auto = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = (auto, auto, auto, [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in past])
    made = torch.onnx.export(whole, given, dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert made is not None
    out.mkdir()
    made.save(out / "model.onnx", external_data=True)


def one(way: str, model: Path, out: Path) -> dict[str, Any]:
    """One export in this process."""
    import onnxscript
    import torch
    import transformers

    from surgeon.resident import peak_bytes

    assert onnxscript
    assert transformers
    torch.set_num_threads(1)
    began = time.perf_counter()
    {"surgeon": by_surgeon, "torch": by_torch}[way](model, out)
    seconds = time.perf_counter() - began
    files = [path for path in out.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
    return {
        "seconds": seconds,
        "peak_rss_bytes": peak_bytes(),
        "bytes_written": written,
        "bytes_linked": sum(path.stat().st_size for path in files) - written,
    }


def main() -> None:
    """Export both ways in turn, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "MODEL", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], Path(args.one[1]), Path(args.one[2]))))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        model = random_model(Path(scratch, "model"), args.layers, args.hidden, args.vocabulary)
        for number in range(args.rounds):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                target = Path(scratch, f"{way}-{number}")
                command = [sys.executable, "-m", "benchmarks.onnx.export_speed", "--one", way, str(model), str(target)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(way, found[way][-1], flush=True)
    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(*(found[way] for way in WAYS), strict=True)]
    options = {"layers": args.layers, "hidden": args.hidden, "vocabulary": args.vocabulary}
    result = {"options": options, "time_ratio": statistics.median(ratios), **found}
    print("time ratio", result["time_ratio"])
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
