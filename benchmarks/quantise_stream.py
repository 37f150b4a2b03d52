"""Quantising a Llama-2-7B-shaped bf16 checkpoint, streamed: time, peak memory, bytes and bits per weight.

    python -m benchmarks.quantise_stream                 # 32 layers, 13.5 GB: needs 20 GB of disk
    python -m benchmarks.quantise_stream --layers 2 --method 'intq(bits=3)' --format gptq_v2

Each method runs in a process of its own; its peak memory is VmHWM, which counts mapped pages, capture and imports too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import merge_stream
from benchmarks.merge_verified import peak

METHODS = ("nf4", "intq(bits=4, group=32)", "intq(bits=3, group=32)", "intq(bits=2, group=32)")


def quantise(base: Path, out: Path, method: str, form: str) -> dict[str, Any]:
    """Quantise in this process, and read the files again and compare, as `surgeon quantise` does."""
    from surgeon import passes
    from surgeon.lower.quantise import quantise
    from surgeon.passes.quantiser import Quantiser
    from surgeon.planning import plan
    from surgeon.source import open_graph, open_source

    began = time.perf_counter()
    source = open_source(base, "causal-lm")
    graph, step = open_graph(source), passes.parse(method)
    assert isinstance(step, Quantiser)
    opened = time.perf_counter() - began
    done = quantise(graph, source, step, out, form=form)
    assert done.comparison is not None
    return {
        "method": done.step.spec(),
        "form": done.written.form,
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_to_open": round(opened, 1),
        "seconds_to_verify": round(done.comparison.seconds, 1),
        "max_error": done.comparison.max_error,
        "peak_rss_bytes": peak(),
        "bytes": done.written.nbytes,
        "planned_bytes": plan(graph, step).bytes.quantised if not form else None,
        "bits_per_weight": round(done.bits_per_weight, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--method", action="append")
    parser.add_argument("--format", default="", help="bitsandbytes, gptq, gptq_v2, compressed-tensors or surgeon")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("BASE", "OUT", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        base, out, method = args.child
        print(json.dumps(quantise(Path(base), Path(out), method, args.format)))
        return
    results = []
    with tempfile.TemporaryDirectory() as place:
        base = Path(place, "base")
        merge_stream.make(base, args.layers)
        for number, method in enumerate(args.method or METHODS):
            child = [sys.executable, "-m", "benchmarks.quantise_stream", "--child", str(base), f"{place}/{number}"]
            done = subprocess.run([*child, method, "--format", args.format], check=True, capture_output=True, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(results[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"layers": args.layers, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
