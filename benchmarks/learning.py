"""What the adapters learn, beside PEFT's: held-out loss of a new domain, same base, data, order, steps and rate.

    python -m benchmarks.learning                      # three seeds, 150 steps: about 25 minutes on 2 cores
    python -m benchmarks.learning --seeds 1 --steps 40

Base: ../shared/models/pystdlib-llama, trained on Python; data: ../shared/data/c_headers, C header files. Both sides run
through the same training loop; their first values differ only in the random draw of A (LoRA) and not at all for VeRA.
Loss reduction is the fall of the held-out loss in nats per token; the ratio is surgeon's over PEFT's, mean over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
BASE = SHARED / "models/pystdlib-llama"
METHODS: dict[str, dict[str, Any]] = {"lora": {"rank": 16, "lr": 2e-3}, "vera": {"rank": 256, "lr": 2e-2}}
BATCH, LENGTH = 8, 256


def ours(method: str, rank: int, seed: int) -> Any:
    """Surgeon's model."""
    import surgeon

    alpha = {"alpha": 32.0} if method == "lora" else {}
    return surgeon.apply(BASE, method, rank=rank, targets="all-linear", seed=seed, **alpha)


def theirs(method: str, rank: int, seed: int) -> Any:
    """PEFT's model."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    if method == "lora":
        config: Any = peft.LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        config = peft.VeraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def reduction(
    model: Any, data: tuple[Any, Any], tokenizer: Any, steps: int, lr: float, seed: int, hooks: Any = ()
) -> tuple[float, float]:
    """Held-out loss before and after training."""
    from surgeon.evaluate import evaluate
    from surgeon.train import train

    train_rows, held_out = data
    before = evaluate(model, tokenizer, held_out).loss
    with tempfile.TemporaryDirectory() as out:
        train(
            model, tokenizer, train_rows, out=out, steps=steps, batch_size=BATCH, lr=lr, warmup=0.1, seed=seed,
            progress=False, hooks=hooks,
        )  # fmt: skip
    return before, evaluate(model, tokenizer, held_out).loss


def measure(method: str, seeds: int, steps: int) -> dict[str, Any]:
    """Both sides, every seed."""
    from surgeon.api import tokenizer_of
    from surgeon.render import load_data

    tokenizer = tokenizer_of(BASE)
    files = SHARED / "data/c_headers.train.jsonl", SHARED / "data/c_headers.heldout.jsonl"
    train_rows, held_out = (load_data(file, tokenizer, LENGTH) for file in files)
    options = METHODS[method]
    runs = []
    for seed in range(seeds):
        run: dict[str, Any] = {"seed": seed}
        for side, make in (("surgeon", ours), ("peft", theirs)):
            model = make(method, options["rank"], seed)
            before, after = reduction(model, (train_rows, held_out), tokenizer, steps, options["lr"], seed)
            run[side] = {"before": before, "after": after, "reduction": before - after}
        runs.append(run)
    means = {side: statistics.mean(run[side]["reduction"] for run in runs) for side in ("surgeon", "peft")}
    return {"runs": runs, "reduction": means, "ratio": means["surgeon"] / means["peft"]}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learning.json")
    options = parser.parse_args()
    found = {method: measure(method, options.seeds, options.steps) for method in options.methods}
    command = f"python -m benchmarks.learning --seeds {options.seeds} --steps {options.steps}"
    options.out.write_text(json.dumps({"command": command, "methods": found}, indent=2) + "\n")
    for method, result in found.items():
        before = result["runs"][0]["surgeon"]["before"]
        sides = result["reduction"]
        print(
            f"{method}: held-out loss {before:.3f}, reduced by {sides['surgeon']:.3f} "
            f"(PEFT {sides['peft']:.3f}, ratio {result['ratio']:.3f})"
        )


if __name__ == "__main__":
    main()
