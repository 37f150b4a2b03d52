"""The chunked loss of a 32k-vocabulary head against whole logits and F.cross_entropy: memory and time, side by side.

    python benchmarks/loss.py                        # 2048 tokens x 32000 x 640, forward and backward
    python benchmarks/loss.py --chunks 64 256 1024   # the default chunk against others

Every measurement is a process of its own and the ways alternate, so that both see the same machine. Memory is the peak
resident size above the weight and the hidden states; seconds are the best of the steps, wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

TOKENS, VOCAB, HIDDEN = 2048, 32000, 640


def measure(way: str, precision: str, steps: int) -> dict[str, float]:
    """Seconds and bytes of `way`: "plain", "default" or a chunk size."""
    import torch

    from surgeon.loss import linear_cross_entropy

    torch.manual_seed(0)
    source, weight = torch.randn(TOKENS, HIDDEN) * 0.5, torch.randn(VOCAB, HIDDEN) * 0.05
    labels = torch.randint(0, VOCAB, (TOKENS,))

    def step() -> float:
        hidden = source.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            if way == "plain":
                logits = torch.nn.functional.linear(hidden, weight).float()
                loss = torch.nn.functional.cross_entropy(logits, labels)
            else:
                chunk = None if way == "default" else int(way)
                loss = linear_cross_entropy(hidden, weight, None, labels, chunk_tokens=chunk)
        loss.backward()
        return loss.item()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "megabytes": (peak - before) / 1024, "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", nargs="*", default=[], help="chunk sizes in tokens, beside the default one")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.steps)))
        return
    for precision in ("fp32", "bf16"):
        print(
            f"{precision}: {TOKENS} tokens, vocabulary {VOCAB}, hidden {HIDDEN}, {len(os.sched_getaffinity(0))} cores"
        )
        for way in ("plain", "default", *options.chunks):
            command = [sys.executable, __file__, "--steps", str(options.steps), "--one", way, precision]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print("  {:8s} {seconds:6.2f} s  {megabytes:6.0f} MB  loss {loss:.5f}".format(way, **found), flush=True)


if __name__ == "__main__":
    main()
