"""What the options of a LoRA may be. Imports no torch."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from surgeon.errors import UsageError
from surgeon.select import numbers

if TYPE_CHECKING:
    from surgeon.passes.lora import Lora


def check(step: Lora) -> None:
    """Raise UsageError for a value that an option cannot have."""
    for rank, least in ((step.rank, 1), *((rank, step.least_rank) for _, rank in step.ranks)):
        if rank < least:
            raise UsageError(f"{step.name}: rank is {rank}", "--rank", f"a rank of at least {least}, for example 8")
    if not 0 <= step.dropout < 1:
        raise UsageError(f"{step.name}: dropout is {step.dropout}", "--dropout", "a probability below 1, e.g. 0.05")
    if step.lora_bias and not step.has_bias:
        raise UsageError(f"{step.name} has no bias of its own", "--lora-bias", "leave it out, or use lora")
    for name in ("lr_ratio", "lr_embedding", "lr_saved"):
        if not 0 < getattr(step, name) < math.inf:
            what, flag = f"{step.name}: {name} is {getattr(step, name)}", f"--{name.replace('_', '-')}"
            raise UsageError(what, flag, "a number above 0; 16 is LoRA+'s ratio")
    numbers(step.experts, "--experts")
    _check_parts(step)
    _check_init(step)


def _check_parts(step: Lora) -> None:
    if step.parts and not step.has_parts:
        what = f"{step.name} has one bypass for a whole projection"
        raise UsageError(what, "--parts", "leave it out, or use lora")
    for word in step.wanted:
        if word not in ("q", "k", "v"):
            raise UsageError(f"{step.name}: '{word}' is no part of a projection", "--parts", "q, k or v, e.g. q,v")


def _check_init(step: Lora) -> None:
    kind = re.sub(r"^(pissa)_niter_\d+$|^(loftq)_iter_[1-9]\d*$|^(eva):.+$", r"\1\2\3", step.init)
    if kind not in step.inits or step.rho < 1:
        what, known = f"{step.name}: init is '{step.init}', rho {step.rho:g}", map(_spelled, step.inits)
        raise UsageError(what, "--init, --rho", f"one of {', '.join(known)}, and a rho of at least 1")


_SPELLED = {"eva": "eva:FILE", "pissa": "pissa, pissa_niter_N", "loftq": "loftq, loftq_iter_N"}


def _spelled(init: str) -> str:
    return _SPELLED.get(init, init)
