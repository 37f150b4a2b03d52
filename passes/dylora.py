"""DyLoRA: one LoRA that works at every rank (Valipour et al. 2023).

Each optimiser step draws a rank b, the same for all layers, and trains what a LoRA of that rank is made of:

    y = W x + α/b · B[:, :b] A[:b] x
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError, nearest
from surgeon.hook import Hook
from surgeon.passes.base import Cost
from surgeon.passes.lora import GAUSSIAN, KAIMING, Lora

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.normal import Base, Normal
    from surgeon.sites import Site

UNIFORM, GEOMETRIC = "uniform", "geometric"
FROZEN, NESTED = "frozen", "nested"
ACTIVE = "active"
SUCCESS = 0.2  # p of "geometric" without a number


@dataclass(frozen=True)
class DyLora(Lora):
    """A LoRA whose first b rows and columns are a LoRA of rank b, for every b up to `rank`.

    a: `[rank, in]`, b: `[out, rank]`, as in LoRA. `active: [rank]`, shared by all sites, holds rank/b in its first b
    entries and 0 behind them: B diag(active) A · α/rank is α/b · B[:, :b] A[:b]. It is all ones but in a training step.
    The scale has the drawn rank in it, as in the paper (kohya's port has another, and multiplies every row).

    Options:
        rank: the highest rank.
        alpha: the numerator of the scale alpha / b.
        dropout: on the adapter's input, while training.
        rslora: scale alpha / √b instead.
        distribution: of b. "uniform" over 1 … rank, as in the reference code; "geometric" or "geometric:p", which
            favours low ranks: P(b) ∝ p (1 − p)^(b − 1), p = 0.2 where none is given.
        update: what a step at rank b changes. "nested": rows 1 … b; "frozen": row b alone, as in the reference code.
            All other rows keep their bits: their optimiser state rests too (in the reference code AdamW's weight decay
            and momentum go on moving them).
    """

    name: ClassVar[str] = "dylora"
    has_bias: ClassVar[bool] = False
    inits: ClassVar[tuple[str, ...]] = (KAIMING, GAUSSIAN)
    rank: int = 8
    distribution: str = UNIFORM
    update: str = NESTED

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = GEOMETRIC if _success(self.distribution) else self.distribution
        for option, given, allowed in (
            ("distribution", kind, (UNIFORM, GEOMETRIC)),
            ("update", self.update, (NESTED, FROZEN)),
        ):
            if given not in allowed:
                raise UsageError(f"dylora: {option} is '{given}'", f"--{option}", f"use {nearest(given, allowed)}")
        if self.ranks:
            raise UsageError("dylora draws one rank for all layers", "--ranks", "leave it out, or use lora")

    def unfit(self, site: Site) -> str:
        """Every group of a convolution would draw its own rank."""
        return "it is a convolution in groups" if site.groups > 1 else super().unfit(site)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x → dropout → a → b diag(active) → · α/rank → + y."""
        made = self.bypass(site)
        low, b = self.low(edit, made)
        active = edit.shared(ACTIVE, (self.rank,), "ones")
        edit.replace(edit.add(edit.y, edit.mul(made.up(edit, low, edit.mul(b, active)), self.scale)))

    def shared_cost(self) -> Cost:
        """The one vector `active`."""
        return Cost(frozen=self.rank)

    def finish(self, graph: Graph, owner: str) -> None:
        """As for every adapter; `active` is known without being stored."""
        super().finish(graph, owner)
        name = f"{owner}.{ACTIVE}"
        graph.tensors[name] = dataclasses.replace(graph.tensors[name], persistent=False)

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """The LoRA of the active rank."""
        from surgeon.normal import Normal

        count = int((params[ACTIVE] != 0).sum())
        made = dataclasses.replace(self.bypass(site), rank=count)
        a, b = made.normal(params["a"][..., :count, :], params["b"][..., :count])
        return Normal(self.scale_at(count), a, b)

    def scale_at(self, rank: int) -> float:
        """alpha / b, or alpha / √b."""
        return self.alpha / (rank**0.5 if self.rslora else rank)

    def weights_at(self, rank: int) -> torch.Tensor:
        """`active` for a rank."""
        import torch

        weights = torch.zeros(self.rank)
        weights[:rank] = self.scale_at(rank) / self.scale
        return weights

    @property
    def any_rank(self) -> int:
        """Every rank up to `rank` was trained."""
        return self.rank

    def active_at(self, rank: int) -> dict[str, Tensor]:
        """`active` for that rank."""
        return {ACTIVE: self.weights_at(rank)}

    def hooks(self, graph: Graph, owner: str, seed: int) -> Sequence[Hook]:
        """The draw, and the rows that rest."""
        return [DrawRank(self, owner, seed)]


def _success(distribution: str) -> float:
    """p of "geometric" or "geometric:p", 0 of anything else."""
    kind, _, given = distribution.partition(":")
    if kind != GEOMETRIC:
        return 0.0
    try:
        success = float(given) if given else SUCCESS
    except ValueError:
        return 0.0
    return success if 0 < success < 1 else 0.0


def drawn(step: int, seed: int, highest: int, distribution: str) -> int:
    """The rank of one optimiser step: it depends on seed and step alone, so on every process it is the same."""
    uniform = random.Random(f"dylora/{seed}/{step}").random()
    success = _success(distribution)
    if not success:
        return 1 + int(uniform * highest)
    total = 1 - (1 - success) ** highest
    below = 0.0
    for rank in range(1, highest + 1):
        below += success * (1 - success) ** (rank - 1) / total
        if uniform < below:
            return rank
    return highest


class DrawRank(Hook):
    """Draws b before a step, and lets the optimiser change the rows of that step alone."""

    def __init__(self, step: DyLora, owner: str, seed: int) -> None:
        self.step, self.owner, self.seed = step, owner, seed
        self.rank = step.rank
        self.held: list[tuple[Tensor, int, list[Tensor]]] = []
        self.masks: list[Any] = []

    def before_step(self, model: nn.Module, step: int, total: int) -> None:
        """Set `active`."""
        if not self.masks and self.step.update == FROZEN:
            self.masks = [p.register_hook(self._masked(axis)) for p, axis in self._parameters(model)]
        self.rank = drawn(step, self.seed, self.step.rank, self.step.distribution)
        self._activate(model, self.rank)

    def before_update(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Keep a copy of the rows that rest, with their optimiser state."""
        self.held = []
        for parameter, axis in self._parameters(model):
            for tensor in (parameter, *_state(optimizer, parameter)):
                self.held.append((tensor, axis, [part.clone() for part in self._resting(tensor.detach(), axis)]))

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Put the copies back; state that this step made is 0 where the rows rest."""
        known = {id(tensor) for tensor, _, _ in self.held}
        for tensor, axis, parts in self.held:
            for part, before in zip(self._resting(tensor.detach(), axis), parts, strict=True):
                part.copy_(before)
        for parameter, axis in self._parameters(model):
            for tensor in _state(optimizer, parameter):
                if id(tensor) not in known:
                    for part in self._resting(tensor, axis):
                        part.zero_()
        self.held = []

    def finish(self, model: nn.Module) -> None:
        """Every row is active again."""
        for mask in self.masks:
            mask.remove()
        self.masks = []
        self._activate(model, self.step.rank)

    def _activate(self, model: nn.Module, rank: int) -> None:
        buffer = model.get_buffer(f"{self.owner}.{ACTIVE}")
        buffer.copy_(self.step.weights_at(rank))

    def _parameters(self, model: nn.Module) -> list[tuple[Tensor, int]]:
        """The a's and b's with the axis of their rank."""
        named = [(f".{name}", parameter) for name, parameter in model.named_parameters()]
        mine = [(n.rpartition(".")[2], p) for n, p in named if f".{self.owner}." in n]
        return [(p, axis) for word, axis in (("a", -2), ("b", -1)) for leaf, p in mine if leaf == word]

    def _masked(self, axis: int) -> Callable[[Tensor], Tensor]:
        """Rows that rest have no gradient, so that clipping does not count them."""

        def mask(grad: Tensor) -> Tensor:
            grad = grad.clone()
            for part in self._resting(grad, axis):
                part.zero_()
            return grad

        return mask

    def _resting(self, tensor: Tensor, axis: int) -> list[Tensor]:
        """The rows that this step must not change."""
        last, whole = self.rank, self.step.rank
        first = last - 1 if self.step.update == FROZEN else 0
        return [tensor.narrow(axis, 0, first), tensor.narrow(axis, last, whole - last)]


def _state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """The optimiser's tensors that have an entry per entry of the parameter."""
    state = getattr(optimizer, "optimizer", optimizer).state.get(parameter, {})
    return [value for value in state.values() if getattr(value, "shape", None) == parameter.shape]
