"""`python -m benchmarks.coverage [--only NAME …]`: every causal architecture and the popular checkpoints, row by row.

Writes `benchmarks/coverage.md`. Rows run in a process of their own that is replaced after a timeout; finished rows are
kept in a JSON-lines file, so that a stopped run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "coverage.md"
CACHE = Path(tempfile.gettempdir()) / "surgeon-coverage.jsonl"
COLUMNS = ("name", "captured", "attention", "applied", "trained", "merged", "exported", "seconds", "reason")
_HEAD = """# Coverage

`python -m benchmarks.coverage` · torch {torch}, transformers {transformers}, CPU, tiny random models.

captured: largest error of the logits over the largest logit, two shapes, one left-padded, against transformers' eager
fp32 · attention: `surgeon::attention` nodes of attention modules · applied: LoRA sites with `all-linear`, of linears ·
trained: loss of a step in which every adapter parameter got a finite gradient · merged: error of the merged weights ·
exported: error of the ONNX graph in onnxruntime (– : the reason is given) · seconds: of the capture
"""


def names() -> tuple[list[str], list[str]]:
    """Architectures and checkpoints."""
    from benchmarks.zoo import popular
    from benchmarks.zoo.causal import causal_lm_types

    return causal_lm_types(), list(popular.NAMES)


def exporter() -> Callable[[Any], float] | None:
    """The function that exports a graph to ONNX and compares it in onnxruntime, where there is one."""
    try:
        return getattr(importlib.import_module("benchmarks.coverage_onnx"), "error_of", None)
    except ImportError:
        return None


def _work(pipe: Connection) -> None:
    import torch
    import transformers

    from benchmarks.coverage_row import as_dict, row

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    export = exporter()
    while True:
        pipe.send(as_dict(row(pipe.recv(), export)))


class Worker:
    """A process that makes rows, started again after a timeout or a crash."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: Any = None
        self.pipe: Any = None

    def row(self, name: str) -> dict[str, Any]:
        """One row, or the reason why it took too long or died."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, end = context.Pipe()
            self.process = context.Process(target=_work, args=(end,), daemon=True)
            self.process.start()
            end.close()
        self.pipe.send(name)
        try:
            if self.pipe.poll(self.seconds):
                return self.pipe.recv()
            reason = f"not done after {self.seconds:.0f} s"
        except EOFError:
            reason = "the process died"
        self.process.kill()
        self.process = None
        return {"name": name, "reason": reason}


def _cached() -> dict[str, dict[str, Any]]:
    if not CACHE.exists():
        return {}
    return {row["name"]: row for row in map(json.loads, CACHE.read_text().splitlines())}


def _line(row: dict[str, Any]) -> str:
    cells = [str(row.get(column, "")) or "–" for column in COLUMNS]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The whole document."""
    import torch
    import transformers

    text = [_HEAD.format(torch=torch.__version__, transformers=transformers.__version__)]
    for title, group in zip(("Architectures", "Popular checkpoints"), names(), strict=True):
        done = [rows[name] for name in group if name in rows]
        steps = ("captured", "trained", "merged", "exported")
        counts = ", ".join(f"{sum(bool(row.get(step)) for row in done)} {step}" for step in steps)
        nodes = sum(bool(r.get("captured")) and not str(r.get("attention", "0")).startswith("0") for r in done)
        text.append(f"\n## {title}: {len(done)} of {len(group)} rows: {counts}, {nodes} with attention nodes\n")
        text.append("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        text += [_line(row) for row in done]
    return "\n".join(text) + "\n"


def main() -> None:
    """Make the rows that are missing, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="make these rows again")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds per row")
    options = parser.parse_args()
    if options.fresh:
        CACHE.unlink(missing_ok=True)
    rows, worker = _cached(), Worker(options.timeout)
    architectures, checkpoints = names()
    for name in options.only or [n for n in (*architectures, *checkpoints) if n not in rows]:
        start = time.perf_counter()
        rows[name] = worker.row(name)
        with CACHE.open("a") as cache:
            cache.write(json.dumps(rows[name]) + "\n")
        print(f"{time.perf_counter() - start:5.1f} s {_line(rows[name])}", flush=True)
    TABLE.write_text(table(rows))


if __name__ == "__main__":
    main()
