"""How long `surgeon plan` takes from a config alone, beside importing what it needs, and whether depth costs anything.

    python -m benchmarks.plan_speed

Every number is of a fresh process; kinds are alternated, medians of five. `import` is torch and transformers' Llama.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "plan_speed.json"
IMPORT = [sys.executable, "-c", "import torch, transformers.models.llama.modeling_llama"]
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000, "dtype": "float16",
}  # fmt: skip
GOALS = {"plan_over_import": 2.0, "deep_over_shallow": 1.2, "peak_rss_bytes": 1.2e9}


def measured(command: list[str]) -> dict[str, float]:
    """Wall and processor seconds and the peak memory of one process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with {status}")
    process.returncode = 0
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024.0,
    }


def plan_command(folder: Path, layers: int) -> list[str]:
    """`surgeon plan` on a Llama-2-70B of this depth."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layers": layers}))
    options = ["--method", "lora", "--rank", "64", "--targets", "all-linear", "--json"]
    return [sys.executable, "-m", "surgeon", "plan", str(folder), *options]


def run(rounds: int) -> dict[str, object]:
    """The medians, the ratios, and the goals they are held against."""
    with tempfile.TemporaryDirectory() as place:
        commands = {
            "import": IMPORT,
            "plan_2_layers": plan_command(Path(place) / "shallow", 2),
            "plan_80_layers": plan_command(Path(place) / "deep", 80),
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for turn in range(rounds + 1):
            for name, command in commands.items():
                found = measured(command)
                if turn:  # the first round warms the file cache
                    runs[name].append(found)
                print(f"{name}: {found['seconds']:.2f} s, {found['peak_rss_bytes'] / 1e6:.0f} MB", file=sys.stderr)
    medians = {
        name: {key: statistics.median(found[key] for found in each) for key in each[0]} for name, each in runs.items()
    }

    def ratio(first: str, second: str, key: str = "seconds") -> float:
        return round(medians[first][key] / medians[second][key], 3)

    return {
        "command": f"python -m benchmarks.plan_speed --rounds {rounds}",
        "rounds": rounds,
        "medians": medians,
        "plan_over_import": ratio("plan_80_layers", "import"),
        "plan_over_import_cpu": ratio("plan_80_layers", "import", "cpu_seconds"),
        "deep_over_shallow": ratio("plan_80_layers", "plan_2_layers"),
        "deep_over_shallow_cpu": ratio("plan_80_layers", "plan_2_layers", "cpu_seconds"),
        "peak_rss_bytes": max(found["peak_rss_bytes"] for found in runs["plan_80_layers"]),
        "goals": GOALS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = run(arguments.rounds)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "medians"}, indent=1))


if __name__ == "__main__":
    main()
