"""`python -m benchmarks.zoo.check [names…]`: does every architecture build and run here? Prints a Markdown table."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
import transformers
from transformers import PretrainedConfig

from benchmarks.zoo.build import build, tokens
from benchmarks.zoo.causal import causal_config, causal_lm_types
from benchmarks.zoo.overrides import CANNOT, EXTRA_INPUTS

SHAPES = ((2, 5), (3, 7))


@dataclass(frozen=True)
class Row:
    """What happened to one architecture; `reason` is empty when all went well."""

    name: str
    built: bool = False
    ran: bool = False
    seconds: float = 0.0
    parameters: int = 0
    reason: str = ""


def check(name: str) -> Row:
    """Build `name` and run both `SHAPES`; the logits must be finite and shaped [batch, length, vocab]."""
    if name in CANNOT:
        return Row(name, reason=CANNOT[name])
    start = time.perf_counter()
    built, parameters = False, 0
    try:
        config = causal_config(name)
        refuse_large(config)
        model = build(config)
        built, parameters = True, sum(p.numel() for p in model.parameters())
        for batch, length in SHAPES:
            with torch.no_grad():
                out = model(**tokens(config, batch, length), **EXTRA_INPUTS.get(name, {}))
            if tuple(out.logits.shape[:2]) != (batch, length):
                raise ValueError(f"logits are {tuple(out.logits.shape)} for tokens {(batch, length)}")
            if not torch.isfinite(out.logits).all():
                raise ValueError("logits are not finite")
    except Exception as error:  # the row says why, the table goes on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return Row(name, built, False, time.perf_counter() - start, parameters, reason)
    return Row(name, True, True, time.perf_counter() - start, parameters)


def refuse_large(config: PretrainedConfig, limit: int = 5_000_000) -> None:
    """Raise ValueError naming the largest parameters when a model of `config` has more than `limit` of them."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if sum(sizes.values()) > limit:
        top = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise ValueError(f"{sum(sizes.values()):,} parameters: " + ", ".join(f"{n} {sizes[n]:,}" for n in top))


def line(row: Row) -> str:
    """One Markdown table row."""
    yes = {True: "yes", False: "no"}
    reason = row.reason.replace("|", "/")
    return f"| {row.name} | {yes[row.built]} | {yes[row.ran]} | {row.seconds:.2f} | {row.parameters:,} | {reason} |"


def main() -> None:
    """Print the table, then the totals."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all that transformers registers by default")
    names = parser.parse_args().names or causal_lm_types()
    transformers.logging.set_verbosity_error()
    print("| name | built | forward | seconds | parameters | reason |\n|---|---|---|--:|--:|---|")
    rows = []
    for name in names:
        rows.append(check(name))
        print(line(rows[-1]), flush=True)
    print(f"\n{sum(r.built for r in rows)} of {len(rows)} built, {sum(r.ran for r in rows)} ran")


if __name__ == "__main__":
    main()
