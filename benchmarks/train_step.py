"""One training step, surgeon against PEFT on the same base, batch and optimiser: seconds and memory, side by side.

    python benchmarks/train_step.py                                       # everything, about 15 minutes on 2 cores
    python benchmarks/train_step.py --models small --methods lora --rounds 5

Bases: `small`, ../shared/models/pystdlib-llama (5.5M), with batches of 4 x 256 tokens; `100m`, a random Llama of 102M
(hidden 640, 12 layers, 10 heads, inner 1792, vocabulary 32000, untied), with batches of 2 x 512. Adapters on all
linears: LoRA of rank 16, VeRA of rank 256, and QLoRA: rank 64 with dropout 0.05 over NF4 weights with double
quantisation, PEFT's over bitsandbytes'. AdamW; full batches with a mask of ones, as a data collator makes them.

`overhead / peft` is what adapters add to a step of the frozen model (transformers' own, its gradient taken back to the
embeddings, nothing trained): surgeon's addition over PEFT's.

Seconds: both models live in one process and take steps in turn; the ratio is the median over the rounds of the two
steps of a round, so that other work on the machine meets both. The processor's own time is given beside the wall's: it
counts no waiting for a core that other work holds. Memory: a process per measurement; the peak resident
size (VmHWM, reset after loading) of three steps above what the loaded model holds, its weights all touched and memory
that loading had freed given back to the system. Blocks above 64 KB are mapped on their own there, so that the resident
size follows what is allocated. Optimiser state and gradients count.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALL = Path(__file__).resolve().parents[2] / "shared/models/pystdlib-llama"
BATCHES = {"small": (4, 256), "100m": (2, 512)}
RANKS = {"lora": 16, "vera": 256, "qlora": 64}


def make_100m(folder: Path) -> None:
    """Write the random base, fp32."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=640, intermediate_size=1792, num_hidden_layers=12, num_attention_heads=10, vocab_size=32000,
        max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def surgeon_model(base: str, method: str, precision: str) -> Any:
    """The base with surgeon's adapter."""
    import surgeon

    if method == "qlora":
        return surgeon.apply(base, method, rank=RANKS[method])
    alpha = {"alpha": 32.0} if method == "lora" else {}
    return surgeon.apply(base, method, rank=RANKS[method], targets="all-linear", **alpha)


def peft_model(base: str, method: str, precision: str) -> Any:
    """The base with PEFT's adapter."""
    import peft
    import transformers

    options = {"quantization_config": bits_and_bytes(precision)} if method == "qlora" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **options)
    lora = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method == "lora":
        config: Any = peft.LoraConfig(r=RANKS["lora"], lora_alpha=32, **lora)
    elif method == "qlora":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        config = peft.LoraConfig(r=RANKS["qlora"], lora_alpha=16, lora_dropout=0.05, **lora)
    else:
        config = peft.VeraConfig(r=RANKS["vera"], target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def bits_and_bytes(precision: str) -> Any:
    """QLoRA's settings."""
    import torch
    import transformers

    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )  # fmt: skip


def compiled_model(base: str, method: str, precision: str) -> Any:
    """PEFT's model under torch.compile."""
    import torch

    return torch.compile(peft_model(base, method, precision))


def frozen_model(base: str, method: str, precision: str) -> Any:
    """The base alone, with the gradient of its input: what a step costs without adapters."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    model.enable_input_require_grads()
    return model


MAKERS = {"frozen": frozen_model, "surgeon": surgeon_model, "peft": peft_model, "peft compiled": compiled_model}


class Steps:
    """A model that takes steps on one batch."""

    def __init__(self, side: str, base: str, method: str, shape: tuple[int, int], precision: str) -> None:
        import torch

        self.model = MAKERS[side](base, method, precision).train()
        for tensor in self.model.parameters():
            tensor.detach().sum()
        ids = torch.randint(3, self.model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.context: Any = contextlib.nullcontext
        if precision == "bf16":
            self.context = lambda: torch.autocast("cpu", torch.bfloat16)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.count = sum(p.numel() for p in trained)
        self.optimiser = torch.optim.AdamW(trained or [torch.nn.Parameter(torch.zeros(1))], lr=1e-4)

    def __call__(self) -> tuple[float, float]:
        """One step; its seconds on the wall and of the processor."""
        began, worked = time.perf_counter(), time.process_time()
        with self.context():
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.loss = loss.item()
        return time.perf_counter() - began, time.process_time() - worked


def seconds(base: str, method: str, shape: tuple[int, int], precision: str, sides: list[str], rounds: int) -> Any:
    """Both sides in turn, after two steps each to warm up."""
    both = {side: Steps(side, base, method, shape, precision) for side in sides}
    for _ in range(2):
        for step in both.values():
            step()
    taken: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for turn in range(rounds):
        for side in sides if turn % 2 == 0 else reversed(sides):
            taken[side].append(both[side]())
    found: dict[str, Any] = {}
    for side in sides:
        wall, cpu = zip(*taken[side], strict=True)
        found[side] = {"median_s": statistics.median(wall), "best_s": min(wall), "cpu_s": statistics.median(cpu)}
    for side in sides[1:]:
        for i, name in enumerate(("time", "cpu time")):
            ratios = [ours[i] / theirs[i] for ours, theirs in zip(taken["surgeon"], taken[side], strict=True)]
            found[f"{name} / {side}"] = statistics.median(ratios)
    if "frozen" in sides:
        base_s = found["frozen"]["cpu_s"]
        found["overhead / peft"] = (found["surgeon"]["cpu_s"] - base_s) / (found["peft"]["cpu_s"] - base_s)
    found["trained"] = {side: step.count for side, step in both.items()}
    found["loss"] = {side: step.loss for side, step in both.items()}
    return found


def memory(side: str, base: str, method: str, shape: tuple[int, int], precision: str) -> dict[str, int]:
    """Bytes above the loaded model of this process."""
    steps = Steps(side, base, method, shape, precision)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    loaded = _status("VmRSS")
    for _ in range(3):
        steps()
    return {"loaded": loaded, "above": _status("VmHWM") - loaded}


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measured_memory(side: str, base: str, method: str, name: str, precision: str) -> dict[str, int]:
    """`memory` in a process of its own."""
    command = [sys.executable, __file__, "--one", side, base, method, name, precision]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found: dict[str, int] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small", "100m"], choices=list(BATCHES))
    parser.add_argument("--methods", nargs="+", default=list(RANKS), choices=list(RANKS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="PEFT under torch.compile as a third side")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-frozen", action="store_true", help="leave out the step of the model without adapters")
    parser.add_argument("--out", type=Path, help="JSON file; rows of other measurements in it stay")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.one:
        side, base, method, name, precision = options.one
        print(json.dumps(memory(side, base, method, BATCHES[name], precision)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        run(options, Path(scratch))


def run(options: argparse.Namespace, scratch: Path) -> None:
    """Every measurement, printed and written as it is made."""
    sides = ["surgeon", "peft", *["peft compiled"][: options.compiled], *["frozen"][options.no_frozen :]]
    for name in options.models:
        base = str(SMALL)
        if name == "100m":
            base = str(scratch / "100m")
            make_100m(Path(base))
        for method in options.methods:
            for precision in options.precisions:
                row: dict[str, Any] = {"model": name, "method": method, "precision": precision}
                if not options.no_time:
                    row.update(seconds(base, method, BATCHES[name], precision, sides, options.rounds))
                if not options.no_memory:
                    found = {side: measured_memory(side, base, method, name, precision) for side in sides[:2]}
                    row["memory"] = found
                    row["memory / peft"] = found["surgeon"]["above"] / found["peft"]["above"]
                print(shown(row), flush=True)
                if options.out:
                    record(options.out, {**row, **described(options.rounds)})
                gc.collect()


def shown(row: dict[str, Any]) -> str:
    """One line for people."""
    line = f"{row['model']:6s} {row['method']:5s} {row['precision']}"
    if "surgeon" in row:
        ours, theirs = row["surgeon"]["median_s"], row["peft"]["median_s"]
        line += f"  {ours:.3f} s against {theirs:.3f} s: {row['time / peft']:.2f} (CPU {row['cpu time / peft']:.2f})"
        line += f" (compiled: {row['time / peft compiled']:.2f})" if "time / peft compiled" in row else ""
        line += f"  loss {row['loss']['surgeon']:.4f} {row['loss']['peft']:.4f}"
    if "memory" in row:
        ours, theirs = (row["memory"][side]["above"] / 1e6 for side in ("surgeon", "peft"))
        line += f"  {ours:.0f} MB against {theirs:.0f} MB: {row['memory / peft']:.2f}"
    return line


def record(out: Path, row: dict[str, Any]) -> None:
    """Put a row into the results, in place of an earlier measurement of the same."""
    key = ("model", "method", "precision")
    rows = json.loads(out.read_text()) if out.exists() else []
    kept = [old for old in rows if [old[k] for k in key] != [row[k] for k in key]]
    out.write_text(json.dumps([*kept, row], indent=1) + "\n")


def described(rounds: int) -> dict[str, Any]:
    """How and where a row was measured."""
    import bitsandbytes
    import peft
    import torch
    import transformers

    return {
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)},
    }


if __name__ == "__main__":
    main()
