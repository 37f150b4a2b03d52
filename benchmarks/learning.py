"""What the adapters learn, beside PEFT's: held-out loss of a new domain, same base, data, order, steps and rate.

    python -m benchmarks.learning                      # three seeds, 150 steps: `minutes` in the result
    python -m benchmarks.learning --seeds 1 --steps 40 --methods prompt

Base: ../shared/models/pystdlib-llama, trained on Python; data: ../shared/data/c_headers, C header files. Both sides run
through the same training loop; the first values are the same (rows of the vocabulary for a prompt: PEFT's own default,
N(0, 1), learns less), but for LoRA's A and the MLP of a prefix, which each draws. Loss reduction is the fall of the
held-out loss in nats per token; the ratio is surgeon's over PEFT's, mean over seeds; `worst` is the largest final loss
of surgeon over PEFT's, of the seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
BASE = SHARED / "models/pystdlib-llama"
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "lora": (2e-3, {"rank": 16, "alpha": 32.0, "targets": "all-linear"}),
    "vera": (2e-2, {"rank": 256, "targets": "all-linear"}),
    "prompt": (5e-2, {"tokens": 20}),
    "prefix": (2e-2, {"tokens": 20}),
    "prefix_mlp": (5e-3, {"tokens": 20, "hidden": 256}),
    "ptuning_v2": (2e-2, {"tokens": 20}),
}
BATCH, LENGTH, HELD_OUT = 8, 256, 96


def ours(method: str, seed: int) -> Any:
    """Surgeon's model."""
    import surgeon

    return surgeon.apply(BASE, method.removesuffix("_mlp"), seed=seed, **METHODS[method][1])


def theirs(method: str, seed: int) -> Any:
    """PEFT's model; its virtual tokens begin with the values of surgeon's."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    options = METHODS[method][1]
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    virtual = {**common, "num_virtual_tokens": options.get("tokens")}
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **common),
        "vera": lambda: peft.VeraConfig(r=256, target_modules="all-linear", **common),
        "prompt": lambda: peft.PromptTuningConfig(
            prompt_tuning_init="SAMPLE_VOCAB", tokenizer_name_or_path=str(BASE), **virtual
        ),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual),
        "prefix_mlp": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=256, **virtual),
        "ptuning_v2": lambda: peft.PrefixTuningConfig(**virtual),
    }
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), configs[method]())
    if method in ("prompt", "prefix", "ptuning_v2"):
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(first_values(ours(method, seed)))
    return model


def first_values(model: Any) -> Any:
    """PEFT's one table of virtual tokens with surgeon's first values: rows, or the columns of all layers."""
    import torch

    made = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rows = [p for name, p in made.items() if name.endswith(".rows")]
    columns = [made[name[:-1] + word] for name in made if name.endswith(".k") for word in "kv"]
    return rows[0] if rows else torch.stack(columns).permute(2, 0, 1, 3).flatten(1)


def of_tokens(model: Any) -> Any:
    """The model with logits of the tokens alone: PEFT's prompts have logits too."""
    import torch

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, input_ids: Any, **inputs: Any) -> Any:
            output = self.model(input_ids=input_ids, **inputs)
            output.logits = output.logits[:, -input_ids.shape[1] :]
            return output

    return Tokens() if getattr(model, "peft_type", None) == "PROMPT_TUNING" else model


def reduction(
    model: Any, data: tuple[Any, Any], tokenizer: Any, steps: int, lr: float, seed: int, hooks: Any = ()
) -> tuple[float, float]:
    """Held-out loss before and after training."""
    from surgeon.evaluate import evaluate
    from surgeon.train import train

    train_rows, held_out = data
    before = evaluate(of_tokens(model), tokenizer, held_out).loss
    with tempfile.TemporaryDirectory() as out:
        train(
            model, tokenizer, train_rows, out=out, steps=steps, batch_size=BATCH, lr=lr, warmup=0.1, seed=seed,
            progress=False, hooks=hooks,
        )  # fmt: skip
    return before, evaluate(of_tokens(model), tokenizer, held_out).loss


def measure(method: str, seeds: int, steps: int) -> dict[str, Any]:
    """Both sides, every seed."""
    from surgeon.api import tokenizer_of
    from surgeon.render import load_data

    tokenizer = tokenizer_of(BASE)
    files = SHARED / "data/c_headers.train.jsonl", SHARED / "data/c_headers.heldout.jsonl"
    train_rows, held_out = (load_data(file, tokenizer, LENGTH) for file in files)
    held_out = dataclasses.replace(held_out, samples=held_out.samples[:HELD_OUT])
    lr = METHODS[method][0]
    runs = []
    for seed in range(seeds):
        run: dict[str, Any] = {"seed": seed}
        for side, make in (("surgeon", ours), ("peft", theirs)):
            model = make(method, seed)
            before, after = reduction(model, (train_rows, held_out), tokenizer, steps, lr, seed)
            run[side] = {"before": before, "after": after, "reduction": before - after}
        runs.append(run)
    means = {side: statistics.mean(run[side]["reduction"] for run in runs) for side in ("surgeon", "peft")}
    worst = max(run["surgeon"]["after"] / run["peft"]["after"] for run in runs)
    return {"lr": lr, "runs": runs, "reduction": means, "ratio": means["surgeon"] / means["peft"], "worst": worst}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learning.json")
    options = parser.parse_args()
    known = json.loads(options.out.read_text())["methods"] if options.out.is_file() else {}
    for method in options.methods:
        began = time.perf_counter()
        result = measure(method, options.seeds, options.steps)
        command = f"python -m benchmarks.learning --methods {method} --seeds {options.seeds} --steps {options.steps}"
        known[method] = {"command": command, "minutes": round((time.perf_counter() - began) / 60, 1), **result}
        options.out.write_text(json.dumps({"methods": known}, indent=2) + "\n")
        sides = result["reduction"]
        print(
            f"{method}: held-out loss {result['runs'][0]['surgeon']['before']:.3f}, reduced by {sides['surgeon']:.3f} "
            f"(PEFT {sides['peft']:.3f}, ratio {result['ratio']:.3f}, worst final loss {result['worst']:.4f} x)",
            flush=True,
        )


if __name__ == "__main__":
    main()
