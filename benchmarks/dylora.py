"""One DyLoRA beside a LoRA trained for every rank, and beside one LoRA cut to every rank.

    OMP_NUM_THREADS=1 python -m benchmarks.dylora              # `minutes` of the processor in the result
    OMP_NUM_THREADS=1 python -m benchmarks.dylora --ranks 1 4 8 --steps 40 --rates 0.005 0.01

Base: ../shared/models/pystdlib-llama; adapters on all linears; data: C headers, the first tokens of each piece. What
counts is the fall of the held-out loss in nats per token. Every run has the same data, order, number of steps, scale
(alpha / rank, or alpha / √rank with --rslora) and training loop. Learning rates are the best of one grid: of each
rank's own LoRA for that rank, of DyLoRA for its mean over the ranks, so that its one run is one run at every rank.
DyLoRA is also trained for more steps (--times), at the rate found before.

"share" is DyLoRA's fall over the dedicated LoRA's of that rank; "cut" is that of the LoRA of the highest rank, every
site's change truncated by SVD. The search is a run per rank, at one rate each; seconds are the processor's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.learning import BASE, SHARED, reduction

RESULT = Path(__file__).parent / "results" / "dylora.json"
HIGHEST, ALPHA, HELD_OUT = 8, 4.0, 96
Falls = dict[int, float]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs share."""

    data: tuple[Any, Any]
    tokenizer: Any
    steps: int
    ranks: list[int]
    seed: int
    rslora: bool


def setting(steps: int, length: int, ranks: list[int], seed: int, rslora: bool) -> Setting:
    """Training and held-out samples of the new domain."""
    from surgeon.api import tokenizer_of
    from surgeon.render import load_data

    tokenizer = tokenizer_of(BASE)
    train_rows, held_out = (
        load_data(SHARED / f"data/c_headers.{part}.jsonl", tokenizer, length) for part in ("train", "heldout")
    )
    held_out = dataclasses.replace(held_out, samples=held_out.samples[:HELD_OUT])
    return Setting((train_rows, held_out), tokenizer, steps, ranks, seed, rslora)


def trained(method: str, rank: int, lr: float, of: Setting, **options: Any) -> tuple[Any, float, float, float]:
    """A trained model, its loss before and after, and the seconds of training it."""
    import surgeon

    options |= {"rank": rank, "alpha": ALPHA, "rslora": of.rslora}
    model = surgeon.apply(BASE, method, targets="all-linear", seed=of.seed, **options)
    began = time.process_time()
    before, after = reduction(model, of.data, of.tokenizer, of.steps, lr, of.seed)
    return model, before, after, time.process_time() - began


def dedicated(rank: int, rates: list[float], of: Setting) -> tuple[dict[str, Any], Any]:
    """LoRA of one rank at its best rate, and its model."""
    tried, taken, best = {}, [], None
    for lr in rates:
        model, before, after, seconds = trained("lora", rank, lr, of)
        tried[lr] = before - after
        taken.append(seconds)
        best = model if tried[lr] == max(tried.values()) else best
    lr = max(tried, key=tried.__getitem__)
    print(f"lora, rank {rank}: {tried[lr]:.4f} at {lr:g}, {statistics.mean(taken):.0f} s", flush=True)
    return {"lr": lr, "tried": tried, "reduction": tried[lr], "seconds": statistics.mean(taken)}, best


def dynamic(rates: list[float], of: Setting, **options: Any) -> dict[str, Any]:
    """One DyLoRA at every rank, at its best rate, with the seconds of one run and its evaluations."""
    from surgeon.evaluate_ranks import evaluate_ranks

    tried: dict[float, Falls] = {}
    taken = []
    for lr in rates:
        model, before, _, seconds = trained("dylora", HIGHEST, lr, of, **options)
        began = time.process_time()
        losses = evaluate_ranks(model, of.tokenizer, of.data[1], of.ranks)
        taken.append(seconds + time.process_time() - began)
        tried[lr] = {rank: before - report.loss for rank, report in losses.items()}
        print(f"dylora {options} at {lr:g}: {', '.join(f'{f:.4f}' for f in tried[lr].values())}", flush=True)
    lr = max(tried, key=lambda rate: statistics.mean(tried[rate].values()))
    return {"lr": lr, "tried": tried, "reduction": tried[lr], "seconds": statistics.mean(taken)}


def cut(model: Any, before: float, of: Setting) -> Falls:
    """A trained LoRA truncated to every rank."""
    from surgeon import convert
    from surgeon.evaluate import evaluate
    from surgeon.model import load_model

    found = {}
    for rank in of.ranks:
        small = load_model(convert.to_lora(model.trained(), rank=rank).graph)
        found[rank] = before - evaluate(small, of.tokenizer, of.data[1]).loss
    return found


def measure(rates: list[float], times: list[int], of: Setting, **options: Any) -> dict[str, Any]:
    """Everything, for one seed."""
    import surgeon
    from surgeon.evaluate import evaluate

    before = evaluate(surgeon.apply(BASE, "lora", rank=1), of.tokenizer, of.data[1]).loss
    ones = {1: dynamic(rates, of, **options)}
    for more in times:
        longer = dataclasses.replace(of, steps=more * of.steps)
        ones[more] = dynamic([ones[1]["lr"]], longer, **options)
    runs = {}
    for rank in sorted({*of.ranks, HIGHEST}):
        runs[rank], model = dedicated(rank, rates, of)
    return {"before": before, **compared(ones, runs, cut(model, before, of), of.ranks)}


def compared(
    ones: dict[int, dict[str, Any]], runs: dict[int, dict[str, Any]], shorter: Falls, ranks: list[int]
) -> dict[str, Any]:
    """DyLoRA's runs, by how many times as long they are, against LoRA's."""
    search = sum(runs[rank]["seconds"] for rank in ranks)
    for one in ones.values():
        one["share"] = {rank: one["reduction"][rank] / runs[rank]["reduction"] for rank in ranks}
        one["search_over_it"] = search / one["seconds"]
    return {"dylora": ones, "lora": runs, "cut": shorter, "search_seconds": search}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=list(range(1, HIGHEST + 1)))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-2, 2e-2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--times", nargs="*", type=int, default=[2], help="longer runs of DyLoRA")
    parser.add_argument("--rslora", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", default="nested", choices=["nested", "frozen"])
    parser.add_argument("--distribution", default="uniform", help="as in `surgeon passes dylora`")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    began = time.process_time()
    of = setting(options.steps, options.length, options.ranks, options.seed, options.rslora)
    result = measure(options.rates, options.times, of, update=options.update, distribution=options.distribution)
    told = {name: value for name, value in vars(options).items() if name != "out"} | {"alpha": ALPHA}
    command = shlex.join(["python", "-m", "benchmarks.dylora", *sys.argv[1:]])
    result = {"command": command, "options": told, "minutes": round((time.process_time() - began) / 60, 1), **result}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    show(result, options.ranks)


def show(result: dict[str, Any], ranks: list[int]) -> None:
    """A line per rank."""
    ones = result["dylora"]
    for rank in ranks:
        shares = ", ".join(f"{t} x: {one['reduction'][rank]:.4f} ({one['share'][rank]:.3f})" for t, one in ones.items())
        print(
            f"rank {rank}: lora {result['lora'][rank]['reduction']:.4f}, cut {result['cut'][rank]:.4f}, dylora {shares}"
        )
    print("search / dylora, seconds: " + ", ".join(f"{t} x: {one['search_over_it']:.2f}" for t, one in ones.items()))


if __name__ == "__main__":
    main()
