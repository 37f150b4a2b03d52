"""The whole `surgeon merge` of a Llama-2-7B-shaped bf16 checkpoint: written, verified, peak memory of both.

    python -m benchmarks.merge_verified                 # 32 layers, 13.5 GB: needs 40 GB of disk
    python -m benchmarks.merge_verified --layers 2 --out /tmp/try.json

One child process merges a random rank-16 LoRA on all linears and verifies; its peak memory is VmHWM, which counts
mapped pages, read after the merge and again after the verification. `cp` of the same files runs before and after it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import merge_stream

RANK, SEED = 16, 0


def peak() -> int:
    """VmHWM in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def merge(base: Path, out: Path) -> dict[str, Any]:
    """Merge and verify in this process."""
    import torch

    from surgeon import run
    from surgeon.initial import Initial
    from surgeon.lower import merge as lower
    from surgeon.passes import make
    from surgeon.source import open_graph, open_source

    torch.set_num_threads(2)
    source = open_source(base)
    graph = run.apply(open_graph(source), make("lora", rank=RANK, targets="all-linear"), seed=SEED)
    for name, spec in graph.trainable().items():
        graph.inserted[name] = Initial("gaussian", spec.shape, SEED, name)
    after_writing: list[int] = []
    verified = lower._verified

    def watched(*args: Any) -> Any:
        after_writing.append(peak())
        return verified(*args)

    lower._verified = watched
    began = time.perf_counter()
    merged = lower.merge(graph, source, out)
    seconds = time.perf_counter() - began
    proof = merged.comparison
    assert proof is not None
    return {
        "merge_seconds": seconds - proof.seconds,
        "verify_seconds": proof.seconds,
        "merge_peak_bytes": after_writing[0],
        "verify_peak_bytes": peak(),
        "max_error": proof.max_error,
        "bound": proof.bound,
        "token_agreement": proof.token_agreement,
        "bytes": source.checkpoint.nbytes,
    }


def main() -> None:
    """Make the base, merge it in a child, print and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/merge_verified.json"))
    parser.add_argument("--child", nargs=2, type=Path)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(merge(*options.child)))
        return
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
        base, copy = Path(folder) / "base", Path(folder) / "copy"
        merge_stream.make(base, options.layers)
        copies = [merge_stream.copy(base, copy)]
        shutil.rmtree(copy, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "benchmarks.merge_verified",
            "--child",
            str(base),
            str(Path(folder) / "merged"),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        copies.append(merge_stream.copy(base, copy))
    result |= {"layers": options.layers, "rank": RANK, "cp": copies, "command": "python -m benchmarks.merge_verified"}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
