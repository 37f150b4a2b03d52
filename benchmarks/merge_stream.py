"""Streaming merge of a Llama-2-7B-shaped checkpoint against `cp` of the same files, alternately in one run.

    python benchmarks/merge_stream.py                 # 32 layers, 13.5 GB: needs 40 GB of disk
    python benchmarks/merge_stream.py --layers 2 --out /tmp/try.json

Each measurement is a process of its own; its peak memory is VmHWM, which counts mapped pages. Both sides are measured
until the data is on the disk (`cp` followed by `sync` of its files, as the merge syncs before it renames); `cp` alone,
which returns while the system still holds most of the data in memory, is reported beside it. Medians, and the fastest
of each: other work on the machine only ever adds time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HIDDEN, INNER, VOCAB = 4096, 11008, 32000
SHARD_BYTES = 4_900_000_000
RANK = 16
TARGETS = {
    "q,v": ("q_proj", "v_proj"),
    "all-linear": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        yield f"{stem}.input_layernorm.weight", (HIDDEN,)
        yield f"{stem}.mlp.down_proj.weight", (HIDDEN, INNER)
        yield f"{stem}.mlp.gate_proj.weight", (INNER, HIDDEN)
        yield f"{stem}.mlp.up_proj.weight", (INNER, HIDDEN)
        yield f"{stem}.post_attention_layernorm.weight", (HIDDEN,)
        for part in "kqvo":
            yield f"{stem}.self_attn.{part}_proj.weight", (HIDDEN, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def split(layers: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes(layers):
        count = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if size + count > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append((name, shape))
        size += count
    return files


def make(folder: Path, layers: int) -> None:
    """A random bf16 checkpoint: every weight is normal with deviation 0.02, drawn from a block that is reused."""
    import torch

    from surgeon.safetensors_file import header_bytes

    torch.manual_seed(0)
    block = (torch.randn(64 << 20) * 0.02).bfloat16().view(torch.uint8).numpy().data
    folder.mkdir()
    files = split(layers)
    weight_map, total = {}, 0
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header = header_bytes((name, torch.bfloat16, shape) for name, shape in tensors)
        left = int(json.loads(header[8:])[tensors[-1][0]]["data_offsets"][1])
        total += left
        weight_map.update({name: file for name, _ in tensors})
        with (folder / file).open("wb") as stream:
            stream.write(header)
            while left:
                stream.write(block[: min(left, len(block))])
                left -= min(left, len(block))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB, "dtype": "bfloat16"}))


def merge(base: Path, out: Path, targets: str) -> dict[str, Any]:
    """Merge rank-16 updates `W + (b a) scale` into the targets; runs in the child."""
    import torch

    from surgeon.checkpoint import Checkpoint
    from surgeon.lower.hf import write_merged

    began = time.perf_counter()
    checkpoint = Checkpoint.open(base)
    generator = torch.Generator().manual_seed(0)
    space = torch.empty(32 << 20)

    def delta(shape: tuple[int, ...]) -> Any:
        a = torch.randn(RANK, shape[1], generator=generator) * 0.01
        b = torch.randn(shape[0], RANK, generator=generator) * 0.01

        def merged(weight: torch.Tensor, rows: slice) -> torch.Tensor:
            update = torch.mm(b[rows], a, out=space[: weight.numel()].view_as(weight))
            return weight.add_(update.mul_(2.0))

        return merged

    endings = tuple(f".{target}.weight" for target in TARGETS[targets])
    deltas = {name: delta(info.shape) for name, info in checkpoint.tensors.items() if name.endswith(endings)}
    report = write_merged(checkpoint, deltas, out)
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"seconds": seconds, "peak_rss_bytes": peak, "merged": len(report.merged), "bytes": checkpoint.nbytes}


def copy(base: Path, out: Path) -> dict[str, Any]:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    returned = time.perf_counter() - began
    subprocess.run(["sync", *map(str, out.iterdir())], check=True)
    return {"cp_seconds": returned, "seconds": time.perf_counter() - began}


def child(base: Path, out: Path, targets: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", targets, "--base", str(base), "--folder", str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rounds(base: Path, count: int) -> dict[str, list[dict[str, Any]]]:
    results: dict[str, list[dict[str, Any]]] = {"cp": [], **{targets: [] for targets in TARGETS}}
    out = base.with_name("out")
    for number in range(count):
        for kind, found in results.items():
            found.append(copy(base, out) if kind == "cp" else child(base, out, kind))
            shutil.rmtree(out)
            os.sync()
            print(f"round {number + 1}: {kind:10} {json.dumps(found[-1])}", file=sys.stderr, flush=True)
    return results


def summary(results: dict[str, list[dict[str, Any]]], layers: int) -> dict[str, Any]:
    def median(kind: str, field: str = "seconds") -> float:
        return statistics.median(entry[field] for entry in results[kind])

    def fastest(kind: str, field: str = "seconds") -> float:
        return float(min(entry[field] for entry in results[kind]))

    table: dict[str, Any] = {
        targets: {
            "seconds": round(median(targets), 2),
            "speed_over_synced_cp": round(median("cp") / median(targets), 3),
            "speed_over_cp": round(median("cp", "cp_seconds") / median(targets), 3),
            "fastest_seconds": round(fastest(targets), 2),
            "fastest_speed_over_synced_cp": round(fastest("cp") / fastest(targets), 3),
            "fastest_speed_over_cp": round(fastest("cp", "cp_seconds") / fastest(targets), 3),
            "peak_rss_bytes": max(entry["peak_rss_bytes"] for entry in results[targets]),
            "merged_tensors": results[targets][0]["merged"],
        }
        for targets in TARGETS
    }
    size = results["q,v"][0]["bytes"]
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    return {
        "command": f"python benchmarks/merge_stream.py --layers {layers} --rounds {len(results['cp'])}",
        "checkpoint": {"layers": layers, "bytes": size, "dtype": "bfloat16", "rank": RANK},
        "cp": {"seconds": round(median("cp", "cp_seconds"), 2), "synced_seconds": round(median("cp"), 2)},
        **table,
        "rounds": results,
        "where": machine,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_stream.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(merge(options.base, options.folder, options.child)))
        return
    need = 3 * 2 * sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for _, shape in shapes(options.layers))
    if shutil.disk_usage(options.disk).free < need:
        parser.error(f"{need:,} bytes are needed on {options.disk}: name another --disk or fewer --layers")
    with tempfile.TemporaryDirectory(dir=options.disk, prefix="merge-stream-") as folder:
        base = Path(folder, "base")
        make(base, options.layers)
        result = summary(rounds(base, options.rounds), options.layers)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=2))


if __name__ == "__main__":
    main()
