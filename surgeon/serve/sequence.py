"""A request on its way through the model: what of it is in the pool, and what comes next."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from surgeon.serve.packed import Packed


@dataclass(eq=False)
class Sequence:
    """Tokens of one request, those of a prompt adapter first.

    Attributes:
        owner: its name in the pool.
        packed: its adapter, None for the bare base.
        tokens: ids of the text so far; each of an adapter's virtual tokens has an id too, which nobody reads.
        most: tokens it may ever have, virtual ones included.
        done: how many of them are in the pool.
        pages: `[blocks, attentions]`.
    """

    owner: str
    packed: Packed | None
    tokens: list[int]
    most: int
    done: int = 0
    pages: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, owner: str, packed: Packed | None, prompt: list[int], most: int) -> Sequence:
        """A request that has not begun: its prompt, and how many new tokens it may have."""
        virtual = packed.virtual[1] if packed is not None else 0
        return cls(owner, packed, [*[0] * virtual, *prompt], virtual + len(prompt) + most)

    @property
    def virtual(self) -> int:
        """Tokens that are rows of its adapter."""
        return self.packed.virtual[1] if self.packed is not None else 0

    @property
    def left(self) -> int:
        """Tokens that are not in the pool yet."""
        return len(self.tokens) - self.done

    @property
    def order(self) -> tuple[str, str]:
        """Requests that share matrices stand together in a batch."""
        if self.packed is None:
            return "", ""
        return self.packed.bank.key if self.packed.bank is not None else "", self.packed.key

    def table(self) -> torch.Tensor:
        """Its pages as a tensor."""
        return torch.tensor(self.pages, dtype=torch.int64)
