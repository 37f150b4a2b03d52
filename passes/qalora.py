"""QA-LoRA: y = W x + s · B A pool(x), pool summing groups of inputs, so that it folds into zero points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError
from surgeon.passes.base import CONV1D, LINEAR, Adapter, Cost

if TYPE_CHECKING:
    import torch

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.normal import Base, Normal
    from surgeon.sites import Site

POOLS = ("sum", "mean", "peft")


@dataclass(frozen=True)
class QaLora(Adapter):
    """A low-rank bypass that reads sums of groups of inputs (Xu et al. 2024, eq. 4).

    a: `[rank, in / group]` ~ U(−√(6 / (rank + in / group)), …) as in the paper's code, b: `[out, rank]` = 0, so the
    model is unchanged until trained. What it adds to the weight is constant over each group: over group-wise integers
    it folds into their zero points, and codes and scales stay as they are (`surgeon merge --into zero-points`).

    Differs from the paper's code and from PEFT, which pool by the mean: the same tensors mean 1 / group of it in the
    code, and in / group² in PEFT, which multiplies by the number of groups. `pool` says which of them a file is.

    Options:
        rank: r.
        alpha: the numerator of the scale alpha / rank.
        dropout: on the pooled input, while training.
        group: inputs per sum; 0 for the group of the integers below it.
        pool: "sum" (the paper), "mean" (its code) or "peft".
    """

    name: ClassVar[str] = "qalora"
    peft_type: ClassVar[str] = "LORA"
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D)
    learning_rate: ClassVar[float] = 2e-5
    targets: str = "all-linear"
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.0
    group: int = 0
    pool: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise UsageError(f"{self.name}: rank is {self.rank}", "--rank", "a rank of at least 1, for example 64")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{self.name}: dropout is {self.dropout}", "--dropout", "a probability below 1, e.g. 0.05")
        if self.pool not in POOLS:
            raise UsageError(f"{self.name}: pool is '{self.pool}'", "--pool", f"one of {', '.join(POOLS)}")
        if self.group < 0:
            raise UsageError(f"{self.name}: group is {self.group}", "--group", "inputs per group, for example 32")

    def fitted(self, graph: Graph) -> Adapter:
        """With the group of the integers below, which a group of its own must be a multiple of."""
        from surgeon.passes.intq import IntQ

        below = next((step.group for step in graph.applied if isinstance(step, IntQ)), 0)
        if not (self.group or below > 0):
            what = f"{self.name} has no group: nothing is quantised in groups" if not below else "one group per row"
            raise UsageError(what, graph.source, "apply intq(group=32) first, or give --group")
        if self.group and below > 0 and self.group % below:
            what = f"{self.name} pools groups of {self.group}, the weights are quantised in groups of {below}"
            raise UsageError(what, graph.source, f"--group {below}")
        return dataclasses.replace(self, group=self.group or below).saving(graph, graph.fresh)

    def unfit(self, site: Site) -> str:
        """The inputs are no whole number of groups."""
        whole = not site.inp % max(1, self.group)
        return "" if whole else f"{site.inp} inputs are no whole number of groups of {self.group}"

    def cost(self, site: Site) -> Cost:
        """rank · (in / group + out) parameters."""
        count = self.rank * (site.inp // self.group + site.out)
        return Cost(rank=self.rank, trained=count, stored=count, flops=2 * count)

    def scale_at(self, site: Site) -> float:
        """What stands before B A over sums: alpha / rank, and what the pool of `pool` makes of a sum."""
        groups = site.inp // self.group
        factor = {"sum": 1.0, "mean": 1 / self.group, "peft": groups / self.group}[self.pool]
        return self.alpha / self.rank * factor

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x → `[.., in / group, group]` → sum → dropout → a → b → · s → + y."""
        import torch

        aten, groups = torch.ops.aten, site.inp // self.group
        a = edit.param("a", (self.rank, groups), f"uniform:{math.sqrt(6 / (self.rank + groups))}")
        b = edit.param("b", (site.out, self.rank), "zeros")
        split = edit.call(aten.unflatten.int, edit.x, -1, [groups, self.group])
        pooled = edit.dropout(edit.call(aten.sum.dim_IntList, split, [-1]), self.dropout)
        low = edit.linear(pooled, a)
        edit.replace(edit.add(edit.y, edit.mul(edit.linear(low, b), self.scale_at(site))))

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """a and b as they are, over groups."""
        from surgeon.normal import Normal

        return Normal(self.scale_at(site), params["a"], params["b"], group=self.group)

    def peft_unfit(self, task: str) -> str:
        """PEFT's file means its own pooling."""
        return "" if self.pool == "peft" else f"PEFT pools by another factor than '{self.pool}'"

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields."""
        return {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if float(self.alpha).is_integer() else self.alpha,
            "lora_dropout": self.dropout,
            "use_qalora": True,
            "qalora_group_size": self.group,
            "fan_in_fan_out": any(site.kind == CONV1D for site in sites),
            "init_lora_weights": True,
        }

    def peft_keys(self, site: Site) -> dict[str, str]:
        """lora_A and lora_B."""
        return {"a": f"model.{site.path}.lora_A.weight", "b": f"model.{site.path}.lora_B.weight"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> QaLora:
        """PEFT's own pooling; its patterns of ranks are not read."""
        for field in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
            if config.get(field):
                from surgeon.errors import UnsupportedError

                raise UnsupportedError(f"QA-LoRA with {field} is not read", "adapter_config.json", "train it without")
        return cls(
            rank=int(config.get("r", 8)),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout") or 0),
            group=int(config.get("qalora_group_size", 16)),
            pool="peft",
        )
