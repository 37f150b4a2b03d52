"""AdaLoRA beside LoRA and beside PEFT's AdaLoRA: seconds of a step, and what is learnt at an equal final budget.

    python -m benchmarks.adalora                              # everything, about an hour on 2 cores
    python -m benchmarks.adalora --parts time --rounds 5
    python -m benchmarks.adalora --parts learning --seeds 1 --steps 40 --rates 0.005 0.015 0.03

Base: ../shared/models/pystdlib-llama; adapters on all linears.

Time: AdamW on one batch of 4 x 256 tokens, every model in one process, steps in turn; ratios are medians over the
rounds of the two steps of a round, of the wall's time and of the processor's own. AdaLoRA is measured where it works
most: every step counts importance, chooses among all triplets and masks. "pruned" is the same adapter after its ranks
have gone from 16 to 4 on average.

Learning: fall of the held-out loss (nats per token) on C headers, through the same training loop, data and order. LoRA
has the rank that AdaLoRA's ranks have on average at the end (8, from 12), and both the scale 2. Learning rates are each
method's best of `--rates` on seed 0 where that is given, else those below.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.learning import BASE, SHARED, reduction

START, PRUNED = 16, 4
LENGTH = 256
RANK, TARGET = 12, 8
SCALE = 2.0
T_INIT, T_FINAL = 0.1, 0.4
RATES = {"lora": 5e-3, "adalora": 3e-2, "eager": 3e-2, "peft": 3e-2}


# ---- seconds of a step


class Steps:
    """A model that takes steps on one batch; `allocate(step)` is what follows the optimiser's."""

    def __init__(self, model: Any, hooks: Any = (), total: int = 10**6) -> None:
        import torch

        self.model, self.hooks, self.total, self.done = model.train(), hooks, total, 0
        ids = torch.randint(3, model.config.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(0))
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def __call__(self) -> tuple[float, float]:
        """One step; its seconds on the wall and of the processor."""
        began, worked = time.perf_counter(), time.process_time()
        for hook in self.hooks:
            hook.before_step(self.model, self.done, self.total)
        loss = self.model(**self.batch).loss
        for hook in self.hooks:
            extra = hook.extra_loss(self.model)
            loss = loss if extra is None else loss + extra
        loss.backward()
        self.optimiser.step()
        for hook in self.hooks:
            hook.after_step(self.model, self.optimiser, self.done, self.total)
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1
        return time.perf_counter() - began, time.process_time() - worked


def ours(method: str, seed: int = 0, **options: Any) -> Any:
    """Surgeon's model."""
    import surgeon

    return surgeon.apply(BASE, method, targets="all-linear", seed=seed, **options)


def theirs(seed: int, **options: Any) -> Any:
    """PEFT's AdaLoRA, and its hook."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from surgeon.hook import Hook

    class Allocate(Hook):
        """What PEFT's users are to call after every step."""

        def after_step(self, model: Any, optimizer: Any, step: int, total: int) -> None:
            model.base_model.update_and_allocate(step + 1)

    torch.manual_seed(seed)
    config = peft.AdaLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", orth_reg_weight=0.1, **options)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config), [Allocate()]


def with_hooks(model: Any) -> tuple[Any, Any]:
    """Surgeon's model and its hooks."""
    from surgeon.hook import hooks_of

    return model, hooks_of(model.graph, 0)


def sides() -> dict[str, Steps]:
    """Everything that is timed."""
    total = 10**6
    alpha = 2.0 * START
    found = {
        "lora": Steps(ours("lora", rank=START, alpha=alpha)),
        "adalora": Steps(
            *with_hooks(ours("adalora", rank=START, target_rank=PRUNED, alpha=alpha, t_init=0.0, t_final=1.0)), total
        ),
        "pruned": Steps(
            *with_hooks(ours("adalora", rank=START, target_rank=PRUNED, alpha=alpha, t_init=0.0, t_final=total - 2.0)),
            total,
        ),
        "peft": Steps(
            *theirs(0, init_r=START, target_r=PRUNED, lora_alpha=alpha, tinit=0, tfinal=1, deltaT=1, total_step=total),
            total,
        ),
    }
    for _ in range(4):  # the pruned one settles at its second step
        for step in found.values():
            step()
    return found


def seconds(rounds: int) -> dict[str, Any]:
    """Medians and ratios."""
    found = sides()
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in found}
    for turn in range(rounds):
        for side in found if turn % 2 == 0 else reversed(found):
            taken[side].append(found[side]())
    counts = {side: sum(p.numel() for p in step.model.parameters() if p.requires_grad) for side, step in found.items()}
    result: dict[str, Any] = {"rounds": rounds, "trained": counts}
    for i, clock in enumerate(("wall", "cpu")):
        medians = {side: statistics.median(pair[i] for pair in pairs) for side, pairs in taken.items()}
        ratios = {
            f"{side} / {other}": statistics.median(a[i] / b[i] for a, b in zip(taken[side], taken[other], strict=True))
            for side, other in (("adalora", "lora"), ("pruned", "lora"), ("adalora", "peft"), ("peft", "lora"))
        }
        result[clock] = {"median_s": medians, "ratios": ratios}
    return result


# ---- what is learnt


def learner(side: str, seed: int, steps: int) -> tuple[Any, Any]:
    """A model to train, and hooks beside its own."""
    if side == "lora":
        return ours("lora", seed, rank=TARGET, alpha=SCALE * TARGET), ()
    if side == "peft":
        first, last = math.ceil(T_INIT * steps), math.ceil(T_FINAL * steps)
        schedule = {"tinit": first, "tfinal": last, "deltaT": 1, "total_step": steps}
        return theirs(seed, init_r=RANK, target_r=TARGET, lora_alpha=SCALE * RANK, **schedule)
    shrink = "eager" if side == "eager" else "end"
    options = {"rank": RANK, "target_rank": TARGET, "alpha": SCALE * RANK, "t_init": T_INIT, "t_final": T_FINAL}
    return ours("adalora", seed, shrink=shrink, **options), ()


def learnt(names: list[str], seeds: int, steps: int, rates: list[float]) -> dict[str, Any]:
    """The fall of the held-out loss, every side and seed."""
    from surgeon.api import tokenizer_of
    from surgeon.render import load_data

    tokenizer = tokenizer_of(BASE)
    files = SHARED / "data/c_headers.train.jsonl", SHARED / "data/c_headers.heldout.jsonl"
    data = tuple(load_data(file, tokenizer, LENGTH) for file in files)

    def fall(side: str, seed: int, lr: float) -> float:
        model, hooks = learner(side, seed, steps)
        began = time.perf_counter()
        before, after = reduction(model, data, tokenizer, steps, lr, seed, hooks)  # type: ignore[arg-type]
        print(f"  {side}, seed {seed}, rate {lr:g}: {before:.4f} - {before - after:.4f}, "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        return before - after

    found: dict[str, Any] = {}
    for side in names:
        tried = {lr: fall(side, 0, lr) for lr in rates}
        lr = max(tried, key=tried.__getitem__) if tried else RATES[side]
        falls = [tried[lr] if seed == 0 and tried else fall(side, seed, lr) for seed in range(seeds)]
        found[side] = {"lr": lr, "tried": tried, "reductions": falls, "reduction": statistics.mean(falls)}
    mean = {side: result["reduction"] for side, result in found.items()}
    ratios = {f"adalora / {o}": mean["adalora"] / mean[o] for o in names if o != "adalora" and "adalora" in names}
    return {"steps": steps, "sides": found, "ratios": ratios}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["time", "learning"], choices=["time", "learning"])
    parser.add_argument("--sides", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rates", nargs="*", type=float, default=[], help="learning rates to try on seed 0")
    parser.add_argument("--out", type=Path, help="JSON file; parts that are not measured stay in it")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    if "time" in options.parts:
        result["time"] = seconds(options.rounds)
    if "learning" in options.parts:
        result["learning"] = learnt(options.sides, options.seeds, options.steps, options.rates)
    for part in options.parts:
        print(json.dumps(result[part], indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
