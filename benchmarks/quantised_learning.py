"""What adapters over a quantised base learn, and what is left of it once they are deployed in few bits.

    OMP_NUM_THREADS=1 python -m benchmarks.quantised_learning            # resumes; `minutes` in the result
    python -m benchmarks.quantised_learning --bits 2 --steps 600 --rates 0.007 --out benchmarks/results/two_bits.json
    python -m benchmarks.quantised_learning --seeds 1 --steps 5 --rates 0.002 --out /tmp/tried.json

Base: ../shared/models/pystdlib-llama, trained on Python; new domain: ../shared/data/c_headers, C header files, on which
every run trains the same number of steps in the same order. Perplexity is of held-out C headers that no training row
repeats ("new"), and of held-out Python ("old") for the bases. Adapters are on all linears. Integers are in groups of 32
with float zero points.

A run is a method over a grid; its rows are the ways to deploy it:

    as trained   the adapter beside the codes, in floating point: more bits, and a second product per linear
    own grid     what the codes decode to + the adapter, quantised again as the base was
    original     the original weights + the adapter, then quantised: what most people do ("LoRA then quantise")
    zero-points  QA-LoRA's merge: codes and scales stay, nothing is lost

"healed" divides the steps: half of them train LoRA over the plain base, which is merged and quantised, and the other
half QA-LoRA over those codes, with rows in another order; what is deployed is its merge into their zero points.

With the first seed every run is made at the rates given, and at half and twice those until the best for each of its
ways is neither the lowest nor the highest; the other seeds run at the best. One rate alone is taken as it is. QA-LoRA's
zero points are GPTQ's own where its base is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.domain import BASE, SHARED, TRAIN, unseen

OLD = SHARED / "data/pystdlib_long.heldout.jsonl"
RESULT = Path(__file__).parent / "results" / "quantised_learning.json"
RANK, ALPHA, GROUP, BATCH, HELD_OUT = 16, 32.0, 32, 4, 96
MOST_RATES = 5
QALORA_RATE = 1 / 2
"""QA-LoRA's adapters read sums of 32 inputs, about √32 times as large: its rates are smaller by this."""
FACTORS = {"qalora": (QALORA_RATE,), "healed": (1, QALORA_RATE)}
"""Of the rate, where a method's own rates are others."""
BITS = (4, 3, 2)


def grids(bits: Sequence[int] = BITS) -> list[str]:
    """Names of the grids; integers are the nearest ones, or GPTQ's on the training file."""
    whole = [f"int{count}" for count in bits]
    return [*(["nf4"] if 4 in bits else []), *whole, *(f"{name} gptq" for name in whole)]


def quantiser(grid: str) -> Any:
    """The pass of a grid."""
    from surgeon.passes import make

    if grid == "nf4":
        return make("nf4")
    options = {"calibration": str(TRAIN)} if grid.endswith("gptq") else {}
    return make("intq", bits=int(grid[3]), group=GROUP, **options)


def runs(bits: Sequence[int]) -> list[tuple[str, str]]:
    """(method, grid of its base) of every run; "fp32" is no grid."""
    low = [grid for grid in grids(bits) if grid != "nf4"]
    plain = [grid for grid in grids(bits) if not grid.endswith("gptq")]
    over = [(method, grid) for method in ("qalora", "healed") for grid in low]
    return [("lora", "fp32"), *(("qlora", grid) for grid in plain), *over]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs share."""

    tokenizer: Any
    train: Any
    new: Any
    old: Any
    steps: int
    bits: Sequence[int] = BITS


def setting(steps: int, length: int, bits: Sequence[int] = BITS) -> Setting:
    """The samples."""
    from surgeon.api import tokenizer_of
    from surgeon.render import load_data

    tokenizer = tokenizer_of(BASE)
    with tempfile.TemporaryDirectory() as folder:
        train, new, old = (load_data(file, tokenizer, length) for file in (TRAIN, unseen(Path(folder)), OLD))
    new, old = (dataclasses.replace(data, samples=data.samples[:HELD_OUT]) for data in (new, old))
    return Setting(tokenizer, train, new, old, steps, bits)


def loss_of(graph: Any, data: Any, of: Setting) -> float:
    """Nats per held-out token."""
    from surgeon.evaluate import evaluate
    from surgeon.model import load_model

    return evaluate(load_model(graph), of.tokenizer, data).loss


def base_rows(of: Setting) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Losses of the base, plain and in every grid."""
    from surgeon import api, run

    def measured(grid: str) -> dict[str, Any]:
        graph = api.read(BASE)
        graph = graph if grid == "fp32" else run.apply(graph, quantiser(grid))
        return {"new": loss_of(graph, of.new, of), "old": loss_of(graph, of.old, of)}

    for grid in ("fp32", *grids(of.bits)):
        yield f"base | {grid}", lambda grid=grid: measured(grid)


def trained(method: str, grid: str, rate: float, seed: int, of: Setting) -> dict[str, Any]:
    """One run: losses of all ways to deploy it, and the seconds of training."""
    import surgeon
    from surgeon import run
    from surgeon.fold import fold
    from surgeon.model import load_model

    began, first = time.process_time(), of.steps // 2
    if method == "healed":
        moved = fold(learned(BASE, "lora", first, rate, seed, of))
        graph = learned(load_model(run.apply(moved, quantiser(grid))), "qalora", of.steps - first, rate, seed + 100, of)
    else:
        base: Any = BASE if grid == "fp32" else surgeon.apply(BASE, quantiser(grid))
        graph = learned(base, "qalora" if method == "qalora" else "lora", of.steps, rate, seed, of)
    seconds = time.process_time() - began
    ways = {way: loss_of(make(), of.new, of) for way, make in deployed(graph, method, grid, of.bits)}
    return {"ways": ways, "seconds": round(seconds, 1)}


def learned(base: Any, adapter: str, steps: int, rate: float, seed: int, of: Setting) -> Any:
    """The graph of a base with an adapter on all linears that was trained."""
    import surgeon
    from surgeon.train import train

    model = surgeon.apply(base, adapter, targets="all-linear", rank=RANK, alpha=ALPHA, seed=seed)
    with tempfile.TemporaryDirectory() as out:
        train(
            model, of.tokenizer, of.train, out=out, steps=steps, batch_size=BATCH, seed=seed, warmup=0.1,
            lr=rate * (QALORA_RATE if adapter == "qalora" else 1), progress=False,
        )  # fmt: skip
    return model.trained()


def deployed(graph: Any, method: str, grid: str, bits: Sequence[int]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The ways to deploy a run, with what makes the graph."""
    from surgeon import run
    from surgeon.fold import fold
    from surgeon.hold import holders
    from surgeon.strip import without
    from surgeon.zero_points import fold_zero_points

    def original(target: str) -> Any:
        return run.apply(fold(without(graph, holders(graph))), quantiser(target))

    yield "as trained", lambda: graph
    if method in ("qalora", "healed"):
        yield f"zero-points {grid}", lambda: fold_zero_points(graph)
        return
    if grid != "fp32":
        yield f"own grid {grid}", lambda: run.apply(fold(graph), quantiser(grid))
    for target in grids(bits) if grid == "fp32" else dict.fromkeys([grid, *(["int4"] if grid == "nf4" else [])]):
        yield f"original {target}", lambda target=target: original(target)


class Results:
    """Rows by name, written after every one of them; those that are there are not measured again."""

    def __init__(self, file: Path, told: dict[str, Any]) -> None:
        self.file, self.told = file, told
        known = json.loads(file.read_text()) if file.is_file() else {}
        self.rows: dict[str, Any] = known.get("rows", {}) if known.get("options") == told else {}
        self.minutes: float = known.get("minutes", 0.0) if self.rows else 0.0

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row, measured if it is not known."""
        if name not in self.rows:
            began = time.process_time()
            self.rows[name] = measure()
            self.minutes += (time.process_time() - began) / 60
            command = shlex.join(["python", "-m", "benchmarks.quantised_learning", *sys.argv[1:]])
            text = {"command": command, "options": self.told, "minutes": round(self.minutes, 2), "rows": self.rows}
            partial = self.file.with_suffix(".partial")
            partial.write_text(json.dumps(text, indent=1) + "\n")
            os.replace(partial, self.file)
            print(f"{self.minutes:6.1f} min  {name}: {json.dumps(self.rows[name])}", flush=True)
        found: dict[str, Any] = self.rows[name]
        return found


def measure(results: Results, of: Setting, seeds: int, rates: list[float]) -> None:
    """Every row that is not known."""
    for name, make in base_rows(of):
        results.row(name, make)

    def one(method: str, grid: str, rate: float, seed: int) -> dict[str, Any]:
        name = f"{method} | {grid} | {rate:g} | {seed}"
        return results.row(name, lambda: trained(method, grid, rate, seed, of))

    first = {run: searched(lambda rate, run=run: one(*run, rate, 0)["ways"], rates) for run in runs(of.bits)}
    for seed in range(1, seeds):
        for run, tried in first.items():
            for rate in sorted(set(best_rates(tried).values())):
                one(*run, rate, seed)


def searched(losses: Callable[[float], dict[str, float]], rates: list[float]) -> dict[float, dict[str, float]]:
    """Rate → losses of all ways: of `rates`, and by doublings beyond them until every way's best lies between two."""
    tried = {rate: losses(rate) for rate in rates}
    while 1 < len(tried) < MOST_RATES:
        best, low, high = set(best_rates(tried).values()), min(tried), max(tried)
        if high in best:
            tried[high * 2] = losses(high * 2)
        elif low in best:
            tried[low / 2] = losses(low / 2)
        else:
            break
    return tried


def best_rates(tried: dict[float, dict[str, float]]) -> dict[str, float]:
    """Way → the rate with the lowest loss of the first seed."""
    ways = next(iter(tried.values()))
    return {way: min(tried, key=lambda rate: tried[rate][way]) for way in ways}


def table(results: Results, seeds: int, bits: Sequence[int]) -> str:
    """The perplexities, in Markdown."""
    lines = ["| base | new domain | old domain |", "|---|---|---|"]
    for name, row in results.rows.items():
        if name.startswith("base"):
            lines.append(f"| {name.split(' | ')[1]} | {math.exp(row['new']):.2f} | {math.exp(row['old']):.2f} |")
    lines += ["", "| method | base | deployed | rate | perplexity, new domain | seeds |", "|" + "---|" * 6]
    for method, grid in runs(bits):
        start = f"{method} | {grid}"
        names = [name.split(" | ") for name in results.rows if name.startswith(f"{start} | ")]
        tried = {float(rate): results.rows[f"{start} | {rate} | 0"]["ways"] for *_, rate, seed in names if seed == "0"}
        for way, rate in best_rates(tried).items():
            rows = [results.rows[f"{start} | {rate:g} | {seed}"] for seed in range(seeds)]
            found = [math.exp(row["ways"][way]) for row in rows]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            own = ", ".join(f"{rate * factor:g}" for factor in FACTORS.get(method, (1,)))
            lines.append(f"| {start} | {way} | {own} | {statistics.mean(found):.2f}{spread} | {len(found)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", nargs="+", type=float, default=[3.5e-3, 7e-3, 1.4e-2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), choices=BITS)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    told = {
        "steps": options.steps,
        "length": options.length,
        "batch": BATCH,
        "rank": RANK,
        "alpha": ALPHA,
        "group": GROUP,
        "bits": options.bits,
    }
    results = Results(options.out, told)
    measure(results, setting(options.steps, options.length, options.bits), options.seeds, options.rates)
    text = table(results, options.seeds, options.bits)
    options.out.with_suffix(".md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
