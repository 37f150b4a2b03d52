"""First values of what passes insert: drawn from a seed and the tensor's name, so the same on every machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Init = str | Callable[[], torch.Tensor]
"""The kind of an `Initial`, or what makes the value itself."""


@dataclass(frozen=True)
class Initial:
    """A tensor's first value: the same on every machine for the same seed and name.

    Kinds: "zeros", "ones", "kaiming" U(−1/√in, 1/√in) with `in` the last axis, "normal" N(0, 1), "normal:<x>" N(0, x²),
    "gaussian" N(0, 1/r²) with r the first axis, "uniform:<x>" U(−x, x), "constant:<x>".
    """

    kind: str
    shape: tuple[int, ...]
    seed: int
    name: str

    def __call__(self) -> torch.Tensor:
        """Draw it."""
        if self.kind == "zeros":
            return torch.zeros(self.shape)
        if self.kind == "ones":
            return torch.ones(self.shape)
        if self.kind.startswith("constant:"):
            return torch.full(self.shape, float(self.kind.removeprefix("constant:")))
        generator = generator_of(self.seed, self.name)
        if self.kind == "kaiming" or self.kind.startswith("uniform:"):
            given = self.kind.partition(":")[2]
            bound = float(given) if given else 1 / math.sqrt(self.shape[-1])
            return torch.empty(self.shape).uniform_(-bound, bound, generator=generator)
        std = 1 / self.shape[0] if self.kind == "gaussian" else float(self.kind.partition(":")[2] or 1)
        return torch.empty(self.shape).normal_(0, std, generator=generator)


def generator_of(seed: int, name: str) -> torch.Generator:
    """The random numbers of a tensor: the same on every machine for the same seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
