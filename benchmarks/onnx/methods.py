"""Methods × architectures × profiles: which adapters are swapped or merged where, and compute what torch does.

    python -m benchmarks.onnx.methods                                   # everything, in about an hour
    python -m benchmarks.onnx.methods --families llama,gpt2 --profiles ort,openvino

Tiny random models of every architecture. Per profile one export with slots; every method is compiled for it and decodes
20 tokens (a model that is run once: its output), alone and in a padded batch. A model or a method without slots is
merged instead. What is done is in benchmarks/results/onnx_methods.json and is not done again; the table is
benchmarks/results/onnx_methods.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxscript
import torch

from benchmarks.zoo import build, causal, graphs
from surgeon import run
from surgeon.errors import SurgeonError
from surgeon.graph import Graph
from surgeon.lower.onnx import adapter_file, adapter_slots, adapters, export
from surgeon.lower.onnx.files import models
from surgeon.lower.onnx.profiles import PROFILES
from surgeon.lower.onnx.proof import replayed
from surgeon.passes import make
from surgeon.verification import make_probes

assert onnxscript  # torch's exporter imports it late
ROOT = Path(__file__).resolve().parents[1] / "results"
RESULTS, TABLE = ROOT / "onnx_methods.json", ROOT / "onnx_methods.md"
ALL = {"targets": "all-linear"}
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {"rank": 4, **ALL}),
    "rsLoRA": ("lora", {"rank": 4, "rslora": True, **ALL}),
    "DoRA": ("dora", {"rank": 4, **ALL}),
    "DyLoRA": ("dylora", {"rank": 4, **ALL}),
    "AdaLoRA": ("adalora", {"rank": 4, "target_rank": 2, **ALL}),
    "VeRA": ("vera", {"rank": 8, **ALL}),
    "IA³": ("ia3", dict(ALL)),
    "LoHa": ("loha", {"rank": 2, **ALL}),
    "prefix": ("prefix", {"tokens": 3}),
    "P-Tuning v2": ("ptuning_v2", {"tokens": 3}),
    "prompt": ("prompt", {"tokens": 3, "init": "normal"}),
}
FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "olmo2",
    "mixtral", "bert", "roberta", "deberta-v2", "distilbert", "t5", "t5-gated", "bart",
)  # fmt: skip
TASKS = {"roberta": "sequence-classification", "distilbert": "sequence-classification"}
GENERIC = ("qwen2", "gemma")
STD = 0.05
Cell = dict[str, Any]


@functools.cache
def base_of(family: str) -> Graph:
    """The tiny random model of an architecture."""
    if family in GENERIC:
        config = causal.causal_config(family)
        return graphs.graph_over(build.build(config), config, "causal-lm")
    return graphs.graph_of(family, TASKS.get(family))


def adapted(family: str, method: str) -> Graph:
    """It with an adapter whose values were drawn."""
    name, options = METHODS[method]
    return graphs.randomised(run.apply(base_of(family), make(name, **options)), std=STD)


def cells_of(family: str, profile: str) -> dict[str, Cell]:
    """Every method of one architecture in one profile."""
    with tempfile.TemporaryDirectory() as place:
        try:
            options: dict[str, Any] = {"profile": profile, "adapters": "slots"}
            out = export.export_onnx(base_of(family), Path(place, "slots"), **options).folder
        except SurgeonError as error:
            return {
                method: _cell(functools.partial(_merged, family, method, profile), error.what) for method in METHODS
            }
        record = adapter_file.read_export(out)
        return {method: _swapped_or_merged(family, method, profile, out, record) for method in METHODS}


def _swapped_or_merged(family: str, method: str, profile: str, out: Path, record: dict[str, Any]) -> Cell:
    found = _cell(lambda: _swapped(family, method, out, record), "")
    return found if found["ok"] else _cell(lambda: _merged(family, method, profile), str(found["why"]))


def _cell(measure: Callable[[], tuple[str, float]], why: str) -> Cell:
    """A measurement, or why there is none; `why` is why it is not a swapped one."""
    try:
        how, error = measure()
    except SurgeonError as failed:
        return {
            "ok": False,
            "how": "",
            "error": None,
            "why": failed.what if not why else f"{why}; merged: {failed.what}",
        }
    return {"ok": True, "how": how, "error": error, "why": why}


def _swapped(family: str, method: str, out: Path, record: dict[str, Any]) -> tuple[str, float]:
    graph = adapted(family, method)
    tensors = adapters.arrays(adapter_slots.compiled(graph, record, method))
    given, parts = adapter_file.as_loaded(tensors, record), [out / name for name in models(record)]
    replay = replayed(graph, parts, make_probes(graph), torch.float32, None, given)
    replay.require(f"{family}, {method}")
    return "preloaded" if given.initial else "slots", replay.max_error / replay.largest


def _merged(family: str, method: str, profile: str) -> tuple[str, float]:
    with tempfile.TemporaryDirectory() as place:
        report = export.export_onnx(adapted(family, method), Path(place, "merged"), profile=profile)
    assert report.replay is not None
    return "merged", report.replay.max_error / report.replay.largest


def table(results: Mapping[str, Mapping[str, Cell]]) -> str:
    """● swapped while the model runs, ◐ merged, ○ neither; the reasons below."""
    marks = {"slots": "●", "preloaded": "●ᵖ", "merged": "◐", "": "○"}
    rows = ["| architecture | profile | " + " | ".join(METHODS) + " | max error |"]
    rows.append("|---|---|" + "---|" * (len(METHODS) + 1))
    reasons: dict[str, list[str]] = {}
    for key, cells in results.items():
        family, profile = key.split("/")
        worst = max((cell["error"] for cell in cells.values() if cell["ok"]), default=None)
        told = "–" if worst is None else f"{worst:.1e}"
        rows.append(f"| {family} | {profile} | " + " | ".join(marks[c["how"]] for c in cells.values()) + f" | {told} |")
        for method, cell in cells.items():
            if cell["why"]:
                reasons.setdefault(cell["why"], []).append(f"{family}/{profile} {method}")
    legend = (
        "● swapped while the model runs and verified: 20 greedy tokens, or the output of a model that is run once, "
        "alone and in a padded batch, every logit within 1e-4 of the largest (max error: relative to it). "
        "●ᵖ the same, its keys and values being what the cache starts with. ◐ merged, and verified. ○ neither."
    )
    why = [f"- {reason}: {', '.join(where[:3])}{f' and {len(where) - 3} more' if len(where) > 3 else ''}"
           for reason, where in reasons.items()]  # fmt: skip
    return "\n".join(["# Adapters in ONNX exports", "", legend, "", *rows, "", "Why not swapped:", "", *why, ""])


def main() -> None:
    """Measure what is not measured yet, writing after every export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--profiles", default=",".join(PROFILES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(given.results.read_text()) if given.results.is_file() else {}
    for family in given.families.split(","):
        for profile in given.profiles.split(","):
            key, began = f"{family}/{profile}", time.perf_counter()
            if key in results:
                continue
            results[key] = cells_of(family, profile)
            given.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            given.results.with_suffix(".md").write_text(table(results))
            done = sum(cell["ok"] for cell in results[key].values())
            print(f"{key}: {done} of {len(METHODS)} in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
