"""Linears over codes in bf16 on a CPU: packed kernels against decoding the weight, bitsandbytes' own, and no codes.

    OMP_NUM_THREADS=1 python -m benchmarks.packed                       # about 2 minutes on a quiet core
    python -m benchmarks.packed --size 1024 --weights 2 --rounds 3 --tokens 1 16

Sides take turns in one process, each over `--weights` linears of `--size` × `--size` in turn, so that weights come from
memory and not from the cache, as when a model decodes; milliseconds are per linear, the median of the rounds.
"decoded" is surgeon without packed kernels, "surgeon" what it does: packed up to some number of tokens. Errors are of
the outputs, relative to those of the weight that the codes decode to, in fp64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgeon import quantised
from surgeon.decode import decode_4bit, decode_groups
from surgeon.numerics import FourBit, quantise_4bit
from surgeon.numerics_int import Groups, quantise_groups
from surgeon.packed import packed_products

RESULT = Path(__file__).parent / "results" / "packed.json"
Linear = Callable[[Tensor], Tensor]
assert quantised


def by_surgeon(stored: FourBit | Groups, packed: bool) -> Linear:
    """The operator of a quantised linear."""
    if isinstance(stored, Groups):
        parts: list[Any] = [stored.codes, stored.scale, stored.zero]
        operator, options = torch.ops.surgeon.int_linear, {"bits": stored.bits}
    else:
        assert stored.nested is not None
        parts = [stored.codes, stored.absmax, stored.nested.scale, stored.nested.offset]
        operator, options = torch.ops.surgeon.nf4_linear, {"out": stored.shape[0], "inp": stored.shape[1]}

    def run(x: Tensor) -> Tensor:
        with packed_products(packed):
            result: Tensor = operator(x, None, *parts, **options)
        return result

    return run


def by_bitsandbytes(weight: Tensor) -> Linear:
    """Linear4bit in evaluation mode, after the forward pass that packs it."""
    from bitsandbytes import nn

    layer: Any = nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu").eval()  # type: ignore[no-any-return]


def sides(form: str, weights: list[Tensor]) -> tuple[dict[str, list[Linear]], Tensor]:
    """Every side over the same weights, and what the first weight's codes stand for."""
    dense = [weight.bfloat16() for weight in weights]
    found: dict[str, list[Linear]] = {"bf16": [lambda x, w=w: F.linear(x, w) for w in dense]}  # type: ignore[misc]
    stored: list[Any]
    if form == "nf4":
        stored = [quantise_4bit(weight, double=True) for weight in weights]
        exact = decode_4bit(stored[0])
        found["bitsandbytes"] = [by_bitsandbytes(weight) for weight in weights]
    else:
        stored = [quantise_groups(weight, int(form[3]), 32, float_zero=True) for weight in weights]
        exact = decode_groups(stored[0])
    found["surgeon"] = [by_surgeon(one, packed=True) for one in stored]
    found["decoded"] = [by_surgeon(one, packed=False) for one in stored]
    return found, exact


def measured(form: str, weights: list[Tensor], tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row per number of tokens."""
    given, exact = sides(form, weights)
    rows = []
    for count in tokens:
        x = torch.randn(count, weights[0].shape[1]).bfloat16()
        expected = x.double() @ exact.double().t()
        row: dict[str, Any] = {"form": form, "tokens": count, "ms": {}, "cpu_ms": {}, "error": {}}
        taken: dict[str, list[tuple[float, float]]] = {side: [] for side in given}
        for turn in range(rounds + 1):
            for side, linears in given.items() if turn % 2 else reversed(given.items()):
                began, worked = time.perf_counter(), time.process_time()
                for linear in linears:
                    linear(x)
                if turn:
                    taken[side].append((time.perf_counter() - began, time.process_time() - worked))
        for side, linears in given.items():
            wall, cpu = zip(*taken[side], strict=True)
            row["ms"][side] = round(1e3 * statistics.median(wall) / len(linears), 4)
            row["cpu_ms"][side] = round(1e3 * statistics.median(cpu) / len(linears), 4)
            row["error"][side] = float((linears[0](x).double() - expected).norm() / expected.norm())
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


@torch.no_grad()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--weights", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--forms", nargs="+", default=["nf4", "int4", "int2"])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.manual_seed(0)
    weights = [torch.randn(options.size, options.size) * 0.02 for _ in range(options.weights)]
    rows = [row for form in options.forms for row in measured(form, weights, options.tokens, options.rounds)]
    told = {name: value for name, value in vars(options).items() if name not in ("out",)}
    about = {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1), "torch": torch.__version__}
    options.out.write_text(json.dumps({"options": told, **about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
