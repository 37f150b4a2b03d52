"""LoHa: y = W x + α / rank · (B₁ A₁ ⊙ B₂ A₂) x (Hyeon-Woo et al. 2022, eq. 2, as LyCORIS and PEFT write it)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError
from surgeon.passes.base import CONV1D, LINEAR, Adapter, Cost

if TYPE_CHECKING:
    import torch

    from surgeon.edit import Edit
    from surgeon.normal import Base, Normal
    from surgeon.sites import Site


@dataclass(frozen=True)
class Loha(Adapter):
    """The entrywise product of two low-rank matrices beside a linear: of rank up to rank².

    a1, a2: `[rank, in]`, b1, b2: `[out, rank]`, all U(−1/√n, 1/√n) with n the last axis, but a2 = 0. The product is a
    whole matrix while it trains, as in PEFT.

    Options:
        rank: of each of the two.
        alpha: the numerator of the scale alpha / rank.
        ranks: (pattern, rank) pairs that override `rank` where the pattern matches a module's path; the first wins.
        alphas: likewise for `alpha`.
    """

    name: ClassVar[str] = "loha"
    peft_type: ClassVar[str] = "LOHA"
    peft_lacks: ClassVar[tuple[str, ...]] = ("bias",)
    peft_kinds: ClassVar[tuple[str, ...]] = (LINEAR,)
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D)
    rank: int = 8
    alpha: float = 8.0
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.rank, *(rank for _, rank in self.ranks)):
            if rank <= 0:
                raise UsageError(f"loha: rank is {rank}", "--rank", "a rank of at least 1, for example 8")

    def at(self, site: Site) -> Loha:
        """With the rank and alpha of this site, and no patterns left."""
        from surgeon.select import matches

        rank = next((rank for pattern, rank in self.ranks if matches(pattern, site.path)), self.rank)
        alpha = next((alpha for pattern, alpha in self.alphas if matches(pattern, site.path)), self.alpha)
        return dataclasses.replace(self, rank=rank, alpha=alpha, ranks=(), alphas=())

    def unfit(self, site: Site) -> str:
        """Raises UsageError for a rank that no [out, in] matrix has."""
        rank = self.at(site).rank
        if rank > min(site.inp, site.out):
            raise UsageError(
                f"loha: rank {rank} is above the size of the layer", f"{site.path} is [{site.out}, {site.inp}]",
                f"a rank of at most {min(site.inp, site.out)}, or leave the module out with --exclude",
            )  # fmt: skip
        return ""

    def cost(self, site: Site) -> Cost:
        """2 · rank · (in + out) parameters, and a multiplication with a whole matrix per token."""
        count = 2 * self.rank * (site.inp + site.out)
        return Cost(rank=self.rank, trained=count, stored=count, flops=2 * site.inp * site.out)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x → (b1 a1 ⊙ b2 a2) → · alpha / rank → + y."""
        import torch

        halves = []
        for number, first in (("1", "kaiming"), ("2", "zeros")):
            a = edit.param(f"a{number}", (self.rank, site.inp), first)
            b = edit.param(f"b{number}", (site.out, self.rank), "kaiming")
            halves.append(edit.call(torch.ops.aten.mm.default, b, a))
        change = edit.mul(edit.mul(*halves), self.alpha / self.rank)
        edit.replace(edit.add(edit.y, edit.linear(edit.x, change)))

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """The two pairs as they are."""
        from surgeon.normal import Normal

        return Normal(self.alpha / self.rank, params["a1"], params["b1"], product=(params["a2"], params["b2"]))

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields; ranks and alphas per site as PEFT's patterns."""
        from surgeon.peft_targets import patterns

        at = {site.path: self.at(site) for site in sites}
        return {
            "alpha": self.alpha,
            "alpha_pattern": patterns({path: step.alpha for path, step in at.items()}, self.alpha),
            "exclude_modules": None,
            "init_weights": True,
            "module_dropout": 0.0,
            "r": self.rank,
            "rank_dropout": 0.0,
            "rank_pattern": patterns({path: step.rank for path, step in at.items()}, self.rank),
            "use_effective_conv2d": False,
        }

    def peft_keys(self, site: Site) -> dict[str, str]:
        """PEFT's a is our b."""
        stem = f"model.{site.path}.hada_w"
        return {f"{ours}{i}": f"{stem}{i}_{theirs}" for i in "12" for ours, theirs in (("a", "b"), ("b", "a"))}

    def peft_unfit(self, task: str) -> str:
        """PEFT's LoHa trains no bias."""
        return "it trains no biases" if self.bias != "none" else ""

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Loha:
        """PEFT's fields by surgeon's names; its two dropouts are for training, and are left behind."""
        ends = {key: rf"re:(.*\.)?({key})" for word in ("rank", "alpha") for key in config.get(f"{word}_pattern") or {}}
        return cls(
            rank=int(config.get("r", 8)),
            alpha=float(config.get("alpha", 8)),
            ranks=tuple((ends[key], int(rank)) for key, rank in (config.get("rank_pattern") or {}).items()),
            alphas=tuple((ends[key], float(alpha)) for key, alpha in (config.get("alpha_pattern") or {}).items()),
        )
