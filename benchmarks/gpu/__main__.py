"""Every kernel on this machine's GPU: numerics against float64, then time against libraries and the roofline.

    python -m benchmarks.gpu [--kernel NAME] [--minutes 8]

Results go to `benchmarks/gpu/<device>.json`. Numerics of all kernels come first: a time of a wrong result is no time.
Exit code 1 if a kernel is wrong; 0, with one line, if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.case import Case, cases, error, results
from benchmarks.gpu.measure import bound, ceilings, milliseconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", default="", help="only files of this name")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new case is begun after this time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU is available: nothing is measured")
        return 0
    end = time.monotonic() + 60 * given.minutes
    chosen = [case for case in cases(torch.device("cuda"), small=False) if given.kernel in case.kernel]
    rows = [checked(case) for case in chosen]
    reached = ceilings()
    for case, row in zip(chosen, rows, strict=True):
        if time.monotonic() < end and row["error"] <= case.tolerance:
            row |= timed(case, reached)
        print(line(row), flush=True)
    path = write(given.out, reached, rows)
    wrong = [row for row in rows if not row["error"] <= row["tolerance"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} cases are right; {path}")
    return 1 if wrong else 0


def checked(case: Case) -> dict[str, Any]:
    """The errors of the kernel, and of the libraries for comparison."""
    row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "tolerance": case.tolerance}
    try:
        exact = results(case.exact)
        row["error"] = error(case.run, exact)
        row["library_errors"] = {name: error(run, exact) for name, run in case.libraries.items()}
    except Exception as failure:  # the other kernels are still to be measured
        row = {"error": float("inf"), **row, "failure": f"{type(failure).__name__}: {failure}"[:500]}
    return row


def timed(case: Case, reached: dict[str, float]) -> dict[str, Any]:
    """Times in milliseconds, the roofline among them."""
    own = milliseconds(case.run)
    libraries = {name: milliseconds(run) for name, run in case.libraries.items()}
    return {"ms": own, "libraries_ms": libraries, "roofline_ms": bound(case.flops, case.moved, reached)}


def line(row: dict[str, Any]) -> str:
    said = f"{row['kernel']:<24} {row['shape']:<34} error {row['error']:.1e}"
    if "ms" not in row:
        return f"{said}  {row.get('failure', 'not timed')}"
    others = ", ".join(f"{name} {ms:.4f}" for name, ms in row["libraries_ms"].items())
    return f"{said}  {row['ms']:.4f} ms  roofline {row['roofline_ms']:.4f}  {others}"


def write(folder: Path, reached: dict[str, float], rows: list[dict[str, Any]]) -> Path:
    import triton

    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    found = {"device": device, "versions": versions, "reached": reached, "cases": rows}
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
