"""The options of training, checked. Imports no torch: the command line makes its flags of these fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from surgeon.errors import UsageError, nearest

SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
PRECISIONS = ("fp32", "bf16")
OPTIMISERS = ("adamw", "paged")


@dataclass(frozen=True)
class Recipe:
    """How to train. One of `steps` and `epochs` (default: one epoch); `warmup` is steps, or a share of all below 1.

    Samples are cut to `max_length` tokens (default: the model's longest position). `lr` is the highest learning rate
    (default: that of the method that was applied).

    A step is `gradient_accumulation` batches of `batch_size` samples. `weight_decay` is AdamW's, `max_grad_norm` clips
    (0: not). `optimizer` "paged" is AdamW whose state leaves the device when there is no room for it: bitsandbytes'
    paged AdamW on CUDA where it is installed, otherwise AdamW, to the bit, with its state in a mapped file. `precision`
    "bf16" is autocast; parameters stay as they are. `eval_every` and `save_every` count steps.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    lr: float | None = None
    scheduler: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int | None = None
    seed: int = 0
    optimizer: str = "adamw"
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    eval_every: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "epochs", "batch_size", "gradient_accumulation", "lr", "eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} = {value} is not above 0", "training options", f"use a positive {name}")
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} = {getattr(self, name)} is below 0", "training options", "use 0 or more")
        named = (("scheduler", tuple(SCHEDULERS)), ("optimizer", OPTIMISERS), ("precision", PRECISIONS))
        for name, known in named:
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"unknown {name} `{value}`", "training options", f"use {nearest(value, known)}")
        if self.steps is not None and self.epochs is not None:
            raise UsageError("both steps and epochs are given", "training options", "give one of them")

    def total_steps(self, samples: int) -> int:
        """The optimiser steps of a run over `samples` samples."""
        if self.steps is not None:
            return self.steps
        batches = math.ceil(samples / self.batch_size)
        return max(1, math.ceil((self.epochs or 1) * math.ceil(batches / self.gradient_accumulation)))

    def warmup_steps(self, total: int) -> int:
        """The steps over which the learning rate rises from 0."""
        return math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)


def make_recipe(options: dict[str, Any]) -> Recipe:
    """The recipe of the options given by name. Raises UsageError for an unknown one."""
    known = [field.name for field in fields(Recipe)]
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option `{name}`", "training options", f"use {nearest(name, known)}")
    return Recipe(**options)
