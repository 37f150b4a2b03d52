"""AdaLoRA: a low-rank bypass in singular-value form, whose ranks move to where they matter (Zhang et al. 2023).

    y = W x + s · P diag(λ) Q x,  s = alpha / (rank + 1e-5)

`surgeon.importance` has the arithmetic of the allocation, `surgeon.allocation` what happens around a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError, nearest
from surgeon.passes.base import CONV, CONV1D, LINEAR, Cost
from surgeon.passes.lora import KAIMING, Lora
from surgeon.peft_lora import whole

if TYPE_CHECKING:
    import torch

    from surgeon.bypass import Bypass
    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.hook import Hook
    from surgeon.normal import Base, Normal
    from surgeon.sites import Site

END, EAGER = "end", "eager"
EPSILON = 1e-5
"""Added to the rank in the scale, by the reference code and by PEFT."""
_UNTRAINED = 10_000
"""Steps written into PEFT's config for an adapter that has not been trained, so that shares have a meaning there."""


@dataclass(frozen=True)
class AdaLora(Lora):
    """A LoRA in singular-value form that prunes itself: global budget, importance by sensitivity and uncertainty.

    a: Q `[r, in]` ~ N(0, 0.02²), e: λ `[r, 1]` = 0, b: P `[out, r]` ~ N(0, 0.02²), as in the reference code. The scale
    keeps the rank it began with, whatever is pruned.

    Options:
        rank: of every site at the beginning.
        target_rank: of a site at the end, on average; 0 is two thirds of `rank`, as in the paper.
        alpha: the numerator of the scale alpha / (rank + 1e-5).
        dropout: on the adapter's input, while training.
        t_init: steps before ranks begin to fall, or a share of the run below 1.
        t_final: steps that are left when ranks have been settled, or a share of the run below 1.
        interval: steps between two allocations.
        beta1: of the running mean of sensitivities.
        beta2: of the running mean of their uncertainty.
        orthogonality: weight of the regulariser that keeps P and Q orthogonal.
        shrink: "end" takes pruned triplets out when ranks are settled, and until then they may revive; "eager" takes
            them out at every allocation.
        ranks: (pattern, rank) pairs for modules that have another number of triplets than `rank`, whose scale they
            keep; training writes what is left here.
    """

    name: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D, CONV)
    least_rank: ClassVar[int] = 0
    has_parts: ClassVar[bool] = False
    peft_packed: ClassVar[bool] = False
    has_bias: ClassVar[bool] = False
    inits: ClassVar[tuple[str, ...]] = (KAIMING,)
    learning_rate: ClassVar[float] = 1e-3
    rank: int = 12
    target_rank: int = 0
    t_init: float = 0.1
    t_final: float = 0.4
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    shrink: str = END
    steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shrink not in (END, EAGER):
            raise UsageError(
                f"adalora: shrink is '{self.shrink}'", "--shrink", f"use {nearest(self.shrink, (END, EAGER))}"
            )
        if self.rslora:
            raise UsageError("adalora's scale is alpha / rank", "--rslora", "leave it out, or use lora")
        if not 0 <= self.target_rank <= self.rank:
            what = f"adalora: target_rank {self.target_rank} is not between 0 and rank {self.rank}"
            raise UsageError(what, "--target-rank", "a target of at most the rank; 0 is two thirds of it")
        for name, least in (("t_init", 0), ("t_final", 0), ("orthogonality", 0), ("interval", 1)):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"adalora: {name} is {getattr(self, name)}", flag, f"at least {least}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"adalora: {name} is {getattr(self, name)}", f"--{name}", "between 0 and 1, e.g. 0.85")

    @property
    def target(self) -> int:
        """The average rank at the end."""
        return self.target_rank or max(1, round(self.rank / 1.5))

    @property
    def divisor(self) -> float:
        """Of the scale."""
        return self.rank + EPSILON

    @property
    def scale(self) -> float:
        """alpha / (rank + 1e-5)."""
        return self.alpha / self.divisor

    def at(self, site: Site) -> AdaLora:
        """With the triplets and the alpha of this site; `rank` stays, for the scale."""
        count = self.rank_at(site.path)
        ranks = (("*", count),) if count != self.rank else ()
        return dataclasses.replace(self, ranks=ranks, alpha=self.alpha_at(site.path), alphas=())

    def unfit(self, site: Site) -> str:
        """A triplet of a convolution in groups would be one of every group."""
        return "it is a convolution in groups" if site.groups > 1 else super().unfit(site)

    def bypass(self, site: Site) -> Bypass:
        """With the triplets that are left."""
        from surgeon.bypass import bypass_at

        return bypass_at(site, self.rank_at(site.path))

    def cost(self, site: Site) -> Cost:
        """r (in + out + 1) parameters."""
        made = self.bypass(site)
        count = made.parameters + made.rank
        return Cost(rank=made.rank, trained=count, stored=count, flops=2 * made.macs)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x → dropout → a ⊙ e → b → · s → + y; a ⊙ e needs no x, so that a step costs what LoRA's does."""
        made = self.bypass(site)
        a = edit.param("a", made.a, "normal:0.02")
        e = edit.param("e", (made.rank, 1), "zeros")
        b = edit.param("b", made.b, "normal:0.02")
        low = made.down(edit, edit.dropout(edit.x, self.dropout), edit.mul(a, e))
        edit.replace(edit.add(edit.y, edit.mul(made.up(edit, low, b), self.scale)))

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """PEFT's order: b @ (a · e) · alpha / (rank + 1e-5)."""
        from surgeon.normal import Normal

        return Normal(self.alpha, params["a"] * params["e"], params["b"], divisor=self.divisor)

    def hooks(self, graph: Graph, owner: str, seed: int) -> Sequence[Hook]:
        """The allocation of ranks, and the regulariser."""
        from surgeon.allocation import AllocateRanks, Rule, Triplets
        from surgeon.fold import folds
        from surgeon.sites import sites

        mine = {item.site.path for item in folds(graph) if item.owner == owner}
        found = [site for site in sites(graph, *self.kinds) if site.path in mine]
        names = {s.path: Triplets(*(s.tensor(owner, word) for word in ("a", "e", "b"))) for s in found}
        rule = Rule(
            self.target, self.t_init, self.t_final, self.interval, self.beta1, self.beta2, self.orthogonality,
            self.shrink == EAGER,
        )  # fmt: skip
        ranks = {site.path: self.rank_at(site.path) for site in found}
        return [AllocateRanks(rule, owner, names, ranks, self.with_ranks)]

    def with_ranks(self, ranks: Mapping[str, int], steps: int) -> AdaLora:
        """The pass whose sites have these ranks, by path, after a run of so many steps."""
        from surgeon.select import grouped

        left = grouped({path: rank for path, rank in ranks.items() if rank != self.rank})
        made = dataclasses.replace(self, ranks=left, steps=steps)
        if any(made.rank_at(path) != rank for path, rank in ranks.items()):
            import re

            made = dataclasses.replace(made, ranks=tuple((f"re:{re.escape(p)}", rank) for p, rank in ranks.items()))
        return made

    def peft_takes(self, site: Site) -> bool:
        """Of convolutions PEFT has those over planes alone."""
        return super().peft_takes(site) and (site.kind != CONV or len(site.window) == 2)

    def packed(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """PEFT keeps matrices, at convolutions too."""
        return tensor

    def unpacked(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """The other way."""
        return tensor

    def peft_unfit(self, task: str) -> str:
        """PEFT has one alpha, and prunes from one rank."""
        if any(alpha != self.alpha for _, alpha in self.alphas):
            return "its AdaLoRA has one alpha for all modules"
        return "modules have more triplets than init_r" if any(rank > self.rank for _, rank in self.ranks) else ""

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields; what is left of each module's triplets as its `rank_pattern`."""
        from surgeon.allocation import steps_of

        steps = self.steps or _UNTRAINED
        first, last = steps_of(self.t_init, steps), steps_of(self.t_final, steps)
        ranks = {site.path: self.rank_at(site.path) for site in sites}
        pruned = any(rank != self.rank for rank in ranks.values())
        masks = {f"{path}.lora_E": [i < rank for i in range(self.rank)] for path, rank in ranks.items()}
        return {
            "init_r": self.rank,
            "target_r": self.target,
            "tinit": first,
            "tfinal": last,
            "deltaT": self.interval,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orthogonality,
            "total_step": max(steps, first + last + 1),
            "rank_pattern": masks if pruned else None,
            "r": 8,
            "lora_alpha": whole(self.alpha),
            "lora_dropout": self.dropout,
            "fan_in_fan_out": any(site.kind == CONV1D for site in sites),
            "init_lora_weights": True,
            "alpha_pattern": {},
            "exclude_modules": None,
            "use_rslora": False,
            "use_dora": False,
            "lora_bias": False,
            "target_parameters": None,
        }

    def peft_keys(self, site: Site) -> dict[str, str]:
        """lora_A, lora_E and lora_B, bare parameters."""
        return {word: f"model.{site.path}.lora_{word.upper()}" for word in ("a", "e", "b")}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> AdaLora:
        """PEFT's `alpha_pattern` and `use_rslora` have no effect on its AdaLoRA, and are not read."""
        rank, pattern = int(config.get("init_r", 12)), config.get("rank_pattern") or {}
        alpha = float(config.get("lora_alpha", 8))
        made = cls(
            rank=rank,
            target_rank=min(int(config.get("target_r", 8)), rank),
            alpha=alpha if alpha > 0 else float(rank),
            dropout=float(config.get("lora_dropout") or 0),
            t_init=float(config.get("tinit", 0)),
            t_final=float(config.get("tfinal", 0)),
            interval=int(config.get("deltaT", 1)),
            beta1=float(config.get("beta1", 0.85)),
            beta2=float(config.get("beta2", 0.85)),
            orthogonality=float(config.get("orth_reg_weight", 0.5)),
        )
        ranks = {name.partition(".lora_E")[0]: sum(map(bool, mask)) for name, mask in pattern.items()}
        return made.with_ranks(ranks, int(config.get("total_step") or 0))
