"""`surgeon compare` on the shared Llama and on MiniLM: the measured rows of the README and of docs/methods.

    OMP_NUM_THREADS=1 python -m benchmarks.compared                  # about 90 minutes on one quiet core; resumes
    python -m benchmarks.compared --only minilm --steps 10 --seeds 1 --out /tmp/tried
    python -m benchmarks.docs_methods --results benchmarks/results/compare_{llama,minilm}.json

The Llama goes from Python to C headers (`benchmarks.domain`), by every method. MiniLM learns to tell eight files of
Python's standard library by single lines (`benchmarks.ptuning_v2`), by the methods for encoders (`ENCODER`). The runs
are kept in --out: a second call goes on there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import domain, ptuning_v2

RESULTS = Path(__file__).parent / "results"
ENCODER = "prefix,ptuning_v2,lora,full,head"


@dataclass(frozen=True)
class Side:
    """One model with its data, and the options of `surgeon compare`."""

    name: str
    title: str
    model: str
    data: Path
    heldout: Path
    steps: int
    options: tuple[str, ...]

    def command(self, out: Path, steps: int, seeds: int) -> list[str]:
        """The call."""
        surgeon = [sys.executable, "-m", "surgeon", "compare", self.model]
        data = ["--data", str(self.data), "--heldout", str(self.heldout), "--peers", "peft", "-o", str(out / self.name)]
        return [*surgeon, *data, "--steps", str(steps or self.steps), "--seeds", str(seeds), *self.options]


def sides(folder: Path) -> Iterator[Side]:
    """The Llama and MiniLM."""
    llama = ("--batch-size", "4", "--max-length", "128")
    yield Side("llama", "pystdlib-llama", str(domain.BASE), domain.TRAIN, domain.unseen(folder), 60, llama)
    train, held, _ = ptuning_v2.lines()
    files = [folder / f"lines.{part}.jsonl" for part in ("train", "heldout")]
    for file, rows in zip(files, (train, held), strict=True):
        file.write_text("".join(json.dumps(dict(row.values)) + "\n" for row in rows), encoding="utf-8")
    sizes = ("--batch-size", str(ptuning_v2.BATCH), "--max-length", str(ptuning_v2.LENGTH))
    options = ("--methods", ENCODER, "--task", ptuning_v2.TASK, *sizes)
    yield Side("minilm", "all-MiniLM-L6-v2", ptuning_v2.base(), *files, 200, options)


def kept(out: Path, side: Side) -> Path:
    """The table, without paths of this machine or the page's place."""
    found = json.loads((out / side.name / "compare.json").read_text(encoding="utf-8"))
    found["settings"] |= {"model": side.title, "data": side.data.name, "heldout": side.heldout.name}
    del found["page"]
    file = RESULTS / f"compare_{side.name}.json"
    file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return file


def main() -> None:
    """Run both, or one; a whole run is kept beside the other results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["llama", "minilm"])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/compared"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for side in sides(asked.out):
        if asked.only in (None, side.name):
            subprocess.run(side.command(asked.out, asked.steps, asked.seeds), check=True)
            if not asked.steps:
                print(f"wrote {kept(asked.out, side)}")


if __name__ == "__main__":
    main()
