"""LongLoRA beside plain LoRA and full fine-tuning: a model trained at 256 tokens is taken to 2,048.

    python -m benchmarks.long_context                       # learning, three seeds
    python -m benchmarks.long_context --seeds 1 --steps 20
    python -m benchmarks.long_context --cost                # time and memory of a step at 2k, 4k, 8k and 16k

Base: ../shared/models/pystdlib-llama with `max_position_embeddings` set to the 256 tokens it was trained at. Data:
../shared/data/pystdlib_long, whole files of the standard library, each a text of its own, cut at the context. All
sides train through the same loop on the same texts in the same order, with positions scaled by 8; the learning rate of
each is the best of `RATES` on seed 0, which go on until the best is neither first nor last. Losses are of held-out
files with whole attention, by position. Runs are written as they end; a second call goes on from there.

Sides: `longlora` (LoRA of rank 8 on the attention's linears, embeddings and norms, shifted sparse attention), `lora+`
(the same with whole attention), `lora` (no embeddings and norms), `full` (everything, whole attention), `scaled`
(nothing trained), `base` (nothing trained, positions as they were).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
RESULTS = Path(__file__).parent / "results"
CONTEXT, TRAINED, BUCKET, BATCH = 2048, 256, 256, 2
SIDES = ("longlora", "lora+", "lora", "full")
RATES = {"longlora": (1e-3, 2e-3, 4e-3), "lora+": (4e-3, 8e-3), "lora": (2e-3, 4e-3), "full": (5e-4, 1e-3, 2e-3)}
Runs = dict[str, dict[str, Any]]
"""What was measured, by side, rate and seed."""
LENGTHS = (2048, 4096, 8192, 16384)
WHOLE = {"lora+": "whole attention", "full": "full fine-tuning"}
"""Sides with whole attention that a step's cost is compared with."""


def make_base(folder: Path) -> Path:
    """The shared model, its config saying what length it was trained at."""
    base = Path(shutil.copytree(SHARED / "models/pystdlib-llama", folder / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": TRAINED}))
    return base


def model_of(side: str, base: Path, seed: int, context: int = CONTEXT) -> Any:
    """A side's model, ready to train."""
    import surgeon
    from surgeon.context import extend

    if side == "full":
        import transformers

        config = transformers.AutoConfig.from_pretrained(base)
        extend(config, context)
        return transformers.AutoModelForCausalLM.from_pretrained(base, config=config, dtype="float32")
    if side in ("base", "scaled"):
        return surgeon.apply(base, "lora", rank=1, context=context if side == "scaled" else 0)
    if side == "longlora":
        return surgeon.apply(base, "longlora", seed=seed, context=context)
    saved = {"modules_to_save": "all-embeddings,all-norms"} if side == "lora+" else {}
    return surgeon.apply(base, "lora", targets="attention-linear", seed=seed, context=context, **saved)


def texts(split: str, tokenizer: Any) -> Any:
    """The files of a split as samples of at most the context."""
    from surgeon.render import load_data

    return load_data(SHARED / f"data/pystdlib_long.{split}.jsonl", tokenizer, CONTEXT)


def losses(model: Any, samples: Any) -> list[float]:
    """Mean loss per token in each bucket of positions, over all held-out files, with whole attention."""
    import torch

    model.eval()
    sums, counts = [0.0] * (CONTEXT // BUCKET), [0] * (CONTEXT // BUCKET)
    for sample in samples.samples:
        ids = torch.tensor(sample.input_ids)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        found = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        for position, value in enumerate(found.tolist()):
            sums[(position + 1) // BUCKET] += value
            counts[(position + 1) // BUCKET] += 1
    return [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]


def trained(side: str, base: Path, data: Any, tokenizer: Any, steps: int, lr: float, seed: int) -> tuple[Any, float]:
    """The model after training, and its seconds."""
    from surgeon.train import train

    model = model_of(side, base, seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        train(
            model, tokenizer, data, out=out, steps=steps, batch_size=BATCH, lr=lr, warmup=0.1, seed=seed,
            progress=False,
        )  # fmt: skip
    return model, time.perf_counter() - began


def learn(base: Path, seeds: int, steps: int, sides: list[str], runs: Runs) -> Iterator[dict[str, Any]]:
    """Every side at its best rate, every seed: all that is known, after each run that was not known."""
    from surgeon.api import tokenizer_of

    tokenizer = tokenizer_of(base)
    data, held_out = texts("train", tokenizer), texts("heldout", tokenizer)

    def run(side: str, rate: float, seed: int) -> float:
        key = f"{side} {rate:g} {seed}"
        if key not in runs:
            model, seconds = trained(side, base, data, tokenizer, steps, rate, seed)
            runs[key] = {"seconds": seconds, "by_position": losses(model, held_out)}
            print(key, round(math.exp(statistics.mean(runs[key]["by_position"])), 3), flush=True)
        return statistics.mean(runs[key]["by_position"])

    for side in ("base", "scaled"):
        if side not in runs:
            runs[side] = {"by_position": losses(model_of(side, base, 0), held_out)}
    found: dict[str, Any] = {side: summary([runs[side]]) for side in ("base", "scaled")}
    for side in sides:
        for tried in search(RATES[side], functools.partial(run, side, seed=0)):
            best, searched = tried
            yield found
        for seed in range(1, seeds):
            run(side, best, seed)
            yield found
        every = [runs[f"{side} {best:g} {seed}"] for seed in range(seeds)]
        found[side] = {"lr": best, "searched": searched, **summary(every)}
        print(f"{side}: perplexity {found[side]['perplexity']:.3f} at a rate of {best}", flush=True)
        yield found


def search(rates: Sequence[float], run: Callable[[float], float]) -> Iterator[tuple[float, dict[str, float]]]:
    """(best so far, loss by rate) after each rate; the rates go on by doublings until the best one lies inside."""
    found: dict[float, float] = {}
    queue = list(rates)
    while queue:
        rate = queue.pop(0)
        found[rate] = run(rate)
        best = min(found, key=found.__getitem__)
        yield best, {f"{rate:g}": loss for rate, loss in sorted(found.items())}
        if not queue and best in (min(found), max(found)):
            queue.append(best * 2 if best == max(found) else best / 2)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Perplexity in all and by position, means over seeds."""
    positions = list(zip(*(run["by_position"] for run in runs), strict=True))
    each = [math.exp(statistics.mean(run["by_position"])) for run in runs]
    return {
        "perplexity": statistics.mean(each),
        "perplexities": each,
        "perplexity_by_position": [math.exp(statistics.mean(values)) for values in positions],
    }


def cost(side: str, length: int, folder: str) -> dict[str, float]:
    """Median seconds of a step on one text, and the peak resident size above the loaded model, in this process."""
    import resource

    import torch

    model = model_of(side, Path(folder), 0, length).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, 4096, (1, length), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = []
    for _ in range(4):
        began = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        taken.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"processor_seconds": statistics.median(taken[1:]), "megabytes": (peak - before) / 1024}


def costs(base: Path, lengths: list[int]) -> dict[str, Any]:
    """A process for every side and length, in turn."""
    found: dict[str, Any] = {}
    for length in lengths:
        for side in ("longlora", "lora+", "full"):
            command = [sys.executable, "-m", "benchmarks.long_context", "--one", side, str(length), str(base)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.setdefault(str(length), {})[side] = json.loads(answer.splitlines()[-1])
        sides = found[str(length)]
        for what, (other, name) in product(("processor_seconds", "megabytes"), WHOLE.items()):
            sides[f"{what} / {name}"] = sides["longlora"][what] / sides[other][what]
        print(length, {key: value for key, value in sides.items() if "/" in key}, flush=True)
    return found


def plot(learned: dict[str, Any], out: Path) -> None:
    """Held-out perplexity by position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    middles = [BUCKET * i + BUCKET // 2 for i in range(CONTEXT // BUCKET)]
    for side, found in learned.items():
        axes.plot(middles, found["perplexity_by_position"], marker="o", markersize=3, label=side)
    axes.set_yscale("log")
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("held-out perplexity")
    axes.set_title(f"From {TRAINED} to {CONTEXT} tokens")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="with --cost")
    parser.add_argument("--cost", action="store_true", help="time and memory instead of learning")
    parser.add_argument("--out", type=Path, default=RESULTS / "long_context.json")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(cost(options.one[0], int(options.one[1]), options.one[2])))
        return
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    with tempfile.TemporaryDirectory() as scratch:
        base = make_base(Path(scratch))
        if options.cost:
            lengths = " ".join(map(str, options.lengths))
            command = f"python -m benchmarks.long_context --cost --lengths {lengths}"
            known["cost"] = {"command": command, **costs(base, options.lengths)}
        else:
            command = f"python -m benchmarks.long_context --seeds {options.seeds} --steps {options.steps}"
            command += f" --sides {' '.join(options.sides)}"
            runs = known.setdefault("runs", {}).setdefault(f"{options.steps} steps", {})
            for learned in learn(base, options.seeds, options.steps, options.sides, runs):
                known["learning"] = {"command": command, "sides": learned}
                options.out.write_text(json.dumps(known, indent=1) + "\n")
            plot(known["learning"]["sides"], options.out.with_suffix(".png"))
    options.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
