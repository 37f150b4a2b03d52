"""The numbers of the README's first screen, measured here in at most ten minutes: `make bench-quick`.

Each line is a shortened run of the benchmark named beside it; the full runs and their results are in
`benchmarks/results`. Ratios are against a peer measured in the same run on this machine. What is not a time runs in two
lanes of one thread each; the training step and the merge are alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, ROWS, HELDOUT = 6, 64, 12
"""Steps, rows of training and of held-out data of the comparison of methods."""
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(out: Path, module: str, *options: str) -> Any:
    """Run one benchmark with its result in `out`, and read that."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *options, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stderr[-2000:]}")
    return json.loads(out.read_text())


def told(*arguments: str) -> str:
    """What a command of surgeon prints."""
    command = [sys.executable, "-m", "surgeon", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=ONE_THREAD)
    if done.returncode:
        raise SystemExit(f"surgeon {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def demo(out: Path) -> Iterator[str]:
    """The whole job, on a base that it trains itself."""
    found = json.loads(told("demo", str(out.with_suffix("")), "--json"))
    for row in found["adapters"]:
        yield (
            f"demo, {row['method']}: {row['trainable_parameters']:,} trained, loss {row['loss_before']:.3f} → "
            f"{row['loss_after']:.3f}; merged within {row['merge_error']:.1e}, ONNX within {row['onnx_error']:.1e}, "
            f"same tokens {row['onnx_agreement']:.0%}"
        )


def plan(out: Path) -> Iterator[str]:
    """Planning a 70B model from its config."""
    found = run(out, "plan_speed", "--rounds", "2")
    yield f"plan of Llama-2-70B from config.json: {found['plan_over_import']:.2f} x importing torch and its model"
    yield f"  peak {found['peak_rss_bytes'] / 1e9:.2f} GB; 80 layers take {found['deep_over_shallow']:.2f} x 2 layers"


def step(out: Path) -> Iterator[str]:
    """A training step on a random Llama of 102M parameters."""
    few = ("--models", "100m", "--methods", "lora", "--precisions", "fp32", "--rounds", "3", "--no-frozen")
    found = run(out, "train_step", *few)
    for row in found:
        yield (
            f"LoRA step, 102M, {row['precision']}: {row['time / peft']:.2f} x PEFT's time, "
            f"{row['memory / peft']:.2f} x its memory above the loaded model"
        )


def merge(out: Path) -> Iterator[str]:
    """Streaming a merge and verifying it: two layers of a 7B shape."""
    found = run(out, "merge_verified", "--layers", "2")
    copied = min(copy["seconds"] for copy in found["cp"])
    yield (
        f"merge of {found['bytes'] / 1e9:.1f} GB in bf16: {copied / found['merge_seconds']:.2f} x the speed of cp, "
        f"peak {found['merge_peak_bytes'] / 1e9:.2f} GB"
    )
    yield (
        f"  verified in {found['verify_seconds']:.0f} s, peak {found['verify_peak_bytes'] / 1e9:.2f} GB: "
        f"largest difference {found['max_error']:.1e}, bound {found['bound']:.1e}"
    )


def llama(out: Path) -> Iterator[str]:
    """The README's table of methods on the shared Llama."""
    return methods("llama", out)


def minilm(out: Path) -> Iterator[str]:
    """The same on MiniLM."""
    return methods("minilm", out)


def methods(name: str, out: Path) -> Iterator[str]:
    """A table of methods over a few steps; needs the repository's surroundings (../shared)."""
    from benchmarks import compared, docs_methods, domain

    if not domain.BASE.is_dir():
        yield f"methods: ../shared is not here, see benchmarks/results/compare_{name}.json"
        return
    folder = out.parent / name
    side = next(side for side in compared.sides(out.parent) if side.name == name)
    rates(json.loads((compared.RESULTS / f"compare_{name}.json").read_text()), folder)
    data, heldout = sample(side.data, ROWS, folder), sample(side.heldout, HELDOUT, folder)
    command = dataclasses.replace(side, data=data, heldout=heldout).command(out.parent, STEPS, 1)
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    if ran.returncode:
        raise SystemExit(f"the comparison on {side.title} failed:\n{ran.stderr[-2000:]}")
    found = json.loads((folder / "compare.json").read_text())
    yield f"{side.title}, {STEPS} steps, one seed, {HELDOUT} held-out rows, {found['base']['loss']:.3f} before:"
    yield docs_methods.overview(found)


def rates(known: dict[str, Any], folder: Path) -> None:
    """Give a comparison the learning rates that the whole one found: no search."""
    from surgeon.compare.schedule import SEARCH, Results, Run

    for row in known["rows"]:
        Results(folder).write(Run(SEARCH, row["method"]), {"lr": row["lr"]})


def sample(file: Path, count: int, folder: Path) -> Path:
    """Rows from all of a file."""
    rows, out = file.read_text(encoding="utf-8").splitlines(keepends=True), folder / f"few.{file.name}"
    out.write_text("".join(rows[place * len(rows) // count] for place in range(count)), encoding="utf-8")
    return out


Part = Callable[[Path], Iterator[str]]
LANES: tuple[tuple[Part, ...], ...] = ((llama,), (demo, plan, minilm))
ALONE: tuple[Part, ...] = (step, merge)


def main() -> None:
    """Run every part and print its lines as they come."""
    began = time.perf_counter()

    def each(parts: Sequence[Part]) -> None:
        for part in parts:
            lines = list(part(Path(folder) / f"{part.__name__}.json"))
            lines.append(f"  {time.perf_counter() - began:.0f} s so far")
            print("\n".join(lines), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        with ThreadPoolExecutor(len(LANES)) as lanes:
            for done in [lanes.submit(each, parts) for parts in LANES]:
                done.result()
        each(ALONE)


if __name__ == "__main__":
    main()
