"""Training hook that moves the rank of low-rank adapters to where it matters, and takes away what is left over."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgeon import resize
from surgeon.errors import UsageError
from surgeon.hook import Hook
from surgeon.importance import Importance, Schedule, best, orthogonality
from surgeon.module import GraphModule
from surgeon.passes.base import Pass
from surgeon.rank_map import draw_ranks

FILE, IMAGE = "ranks.json", "ranks.png"


@dataclass(frozen=True)
class Rule:
    """How ranks are allocated.

    Attributes:
        target: triplets per site at the end, on average.
        warmup: steps before the first allocation, or a share of the run below 1.
        rest: steps after the last, likewise.
        interval: steps between allocations.
        beta1: of the running mean of sensitivities.
        beta2: of the running mean of their uncertainty.
        orthogonality: weight of the regulariser.
        eager: whether what an allocation leaves out is gone, or masked until the last one.
    """

    target: int
    warmup: float
    rest: float
    interval: int
    beta1: float
    beta2: float
    orthogonality: float
    eager: bool


@dataclass(frozen=True)
class Triplets:
    """The names of Q `[r, in]`, λ `[r, 1]` and P `[out, r]` of one site."""

    a: str
    e: str
    b: str

    def axes(self) -> tuple[tuple[str, int], ...]:
        """Each name with the axis of the rank."""
        return (self.a, 0), (self.e, 0), (self.b, 1)


class AllocateRanks(Hook):
    """Counts importance after every step, and from time to time keeps the most important triplets of all sites.

    The λ of the others become 0, so that they may come back, until the last allocation removes them from module,
    optimiser and graph: the steps that follow are cheaper. `with_ranks` makes the pass for given ranks by site path
    and the number of steps of the run.
    """

    def __init__(
        self,
        rule: Rule,
        owner: str,
        sites: Mapping[str, Triplets],
        ranks: Mapping[str, int],
        with_ranks: Callable[[Mapping[str, int], int], Pass],
    ) -> None:
        self.rule, self.owner, self.sites, self.with_ranks = rule, owner, sites, with_ranks
        self.ranks = dict(ranks)
        self.start = sum(ranks.values())
        self.settled, self.total = False, 0
        self.importance = Importance(rule.beta1, rule.beta2)
        self.shrinks: list[dict[str, Any]] = []
        self.parameters: dict[str, nn.Parameter] = {}
        self.stale = False

    def schedule(self, total: int) -> Schedule:
        """Of a run of `total` steps."""
        target = min(self.start, self.rule.target * len(self.sites))
        warmup, rest = (steps_of(given, total) for given in (self.rule.warmup, self.rule.rest))
        return Schedule(self.start, target, warmup, total - rest, self.rule.interval)

    def check(self, total: int) -> None:
        """Raises UsageError for a schedule with no step in which ranks could change."""
        found = self.schedule(total)
        if found.target < found.start and found.warmup >= found.settled:
            raise UsageError(
                f"{self.owner} has no step left in which to move ranks: t_init + t_final are "
                f"{found.warmup} + {total - found.settled} of {total} steps",
                "the schedule of the ranks",
                "lower t_init or t_final (shares of the run below 1), or train for more steps",
            )

    def before_step(self, model: nn.Module, step: int, total: int) -> None:
        """Finds the parameters."""
        if not self.parameters:
            self.total = total
            self._bind(model)

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """The weighted mean distance of Q and P from orthogonal."""
        if not self.rule.orthogonality:
            return None
        rows, columns = ([self.parameters[getattr(s, word)] for s in self.sites.values()] for word in "ab")
        return self.rule.orthogonality * orthogonality(rows, columns)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Counts importance, and allocates when it is time."""
        schedule, done = self.schedule(total), step + 1
        if self.settled or schedule.start == schedule.target:
            return
        if done < schedule.settled:
            self.importance.update(self.parameters)
        if schedule.allocates(done):
            self.settled = done == schedule.settled
            self._allocate(model, optimizer, done, schedule.budget(done))

    def _allocate(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, budget: int) -> None:
        if not self.importance.mean:  # a schedule that ends with the first step
            self.importance.update(self.parameters)
        scores = [self.importance.triplets(s.a, s.e, s.b) for s in self.sites.values()]
        kept = dict(zip(self.sites, best(scores, budget), strict=True))
        with torch.no_grad():
            for path, mask in kept.items():
                self.parameters[self.sites[path].e].masked_fill_(~mask[:, None], 0)
        if self.settled or self.rule.eager:
            self._shrink(model, optimizer, kept, step, _share_lost(scores, list(kept.values())))

    def _shrink(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor], step: int, share: float
    ) -> None:
        began = time.perf_counter()
        removed = sum(int((~mask).sum()) for mask in kept.values())
        cut = {path: mask.nonzero().flatten() for path, mask in kept.items() if not bool(mask.all())}
        wanted = {name: (axis, i) for path, i in cut.items() for name, axis in self.sites[path].axes()}
        resize.select(model, optimizer, wanted)
        for name, (axis, index) in wanted.items():
            self.importance.select(name, axis, index)
        self.ranks.update({path: len(index) for path, index in cut.items()})
        self.stale = self.stale or bool(cut)
        if self.settled:
            self.importance = Importance(self.rule.beta1, self.rule.beta2)
            self._redo(model)
        self._bind(model)
        seconds = round(time.perf_counter() - began, 4)
        if removed:
            self.shrinks.append({"step": step, "removed": removed, "importance": share, "seconds": seconds})

    def finish(self, model: nn.Module) -> None:
        """The graph has the ranks that are left."""
        self._redo(model)
        self.parameters = {}

    def report(self, out: Path) -> None:
        """Writes `ranks.json` and `ranks.png`.

        Of each removal: the step, the triplets, their share of all importance, and the seconds it took.
        """
        found = {
            "triplets": {"start": self.start, "end": sum(self.ranks.values())},
            "shrinks": self.shrinks,
            "ranks": self.ranks,
        }
        (out / FILE).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        draw_ranks(self.ranks, out / IMAGE)

    def state_dict(self) -> dict[str, Any]:
        """Ranks, importance and what was removed."""
        held = {"mean": self.importance.mean, "spread": self.importance.spread}
        plain = {"start": self.start, "total": self.total, "settled": self.settled, "shrinks": list(self.shrinks)}
        return {**plain, "ranks": dict(self.ranks), **held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.importance.mean, self.importance.spread = dict(state["mean"]), dict(state["spread"])
        self.shrinks = list(state["shrinks"])

    def reshape(self, model: nn.Module, state: dict[str, Any]) -> None:
        """The shapes of the checkpoint's ranks, in module and graph."""
        self.start, self.total, self.settled = state["start"], state["total"], state["settled"]
        changed = {path: rank for path, rank in state["ranks"].items() if rank != self.ranks[path]}
        shapes = {}
        for path, rank in changed.items():
            for name, axis in self.sites[path].axes():
                shape = list(model.get_parameter(name).shape)
                shape[axis] = rank
                shapes[name] = tuple(shape)
        resize.reshape(model, shapes)
        self.ranks.update(changed)
        self.stale = bool(changed)
        if self.settled:
            self._redo(model)

    def _bind(self, model: nn.Module) -> None:
        self.parameters = {name: model.get_parameter(name) for s in self.sites.values() for name, _ in s.axes()}

    def _redo(self, model: nn.Module) -> None:
        """Bring the graph in line with the parameters. Ranks of their own keep layers from sharing one graph."""
        if self.stale and isinstance(model, GraphModule):
            step = self.with_ranks(self.ranks, self.total)
            resize.install(model, resize.redo(model.graph, {self.owner: step}))
        self.stale = False


def _share_lost(scores: list[Tensor], kept: list[Tensor]) -> float:
    whole, left = torch.cat(scores), torch.cat(kept)
    return float(whole[~left].sum() / whole.sum()) if bool(whole.any()) else 0.0


def steps_of(given: float, total: int) -> int:
    """A number of steps that is given as such, or as a share of the run below 1."""
    return math.ceil(given * total) if given < 1 else int(given)
