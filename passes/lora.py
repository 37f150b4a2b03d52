"""LoRA: y = W x + s · B A dropout(x), with s = alpha / rank (Hu et al. 2021, eq. 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UnsupportedError, UsageError
from surgeon.passes.base import CONV, CONV1D, EMBEDDING, EXPERTS, LINEAR, Adapter, Cost

if TYPE_CHECKING:
    import torch
    from torch import fx

    from surgeon.bypass import Bypass
    from surgeon.edit import Edit
    from surgeon.normal import Base, Normal
    from surgeon.sites import Site

# Initialisations that leave the base as it is; the others save an adapter to a base they moved.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Lora(Adapter):
    """A low-rank bypass beside a linear, an embedding, a layer's experts or a convolution.

    a: `[rank, in]` ~ U(−1/√in, 1/√in), b: `[out, rank]` = 0, so the model is unchanged until trained. The paper draws a
    from a Gaussian; this is the initialisation of its code and of PEFT. At an embedding a `[rank, vocab]` = 0 and
    b `[out, rank]` ~ N(0, 1).

    Options:
        rank: r.
        alpha: the numerator of the scale alpha / rank.
        dropout: on the adapter's input, while training.
        rslora: scale alpha / √rank instead (Kalajdzievski 2023, eq. 2).
        ranks: (pattern, rank) pairs that override `rank` where the pattern matches a module's path; the first wins.
        alphas: likewise for `alpha`.
        lr_ratio: the learning rate of b over that of a, as in LoRA+ (Hayou et al. 2024), which has 16; 1 for one rate.
        lr_embedding: the learning rate of a and b at embeddings, where `lr_ratio` is not 1.
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    peft_bias: ClassVar[str] = "lora_only"
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D, EMBEDDING, EXPERTS, CONV)
    least_rank: ClassVar[int] = 1
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    lr_ratio: float = 1.0
    lr_embedding: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank, least in ((self.rank, 1), *((rank, self.least_rank) for _, rank in self.ranks)):
            if rank < least:
                raise UsageError(f"{self.name}: rank is {rank}", "--rank", f"a rank of at least {least}, for example 8")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{self.name}: dropout is {self.dropout}", "--dropout", "a probability below 1, e.g. 0.05")
        for name in ("lr_ratio", "lr_embedding"):
            if not 0 < getattr(self, name) < math.inf:
                what, flag = f"{self.name}: {name} is {getattr(self, name)}", f"--{name.replace('_', '-')}"
                raise UsageError(what, flag, "a number above 0; 16 is LoRA+'s ratio")

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / √rank."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at(self, site: Site) -> Lora:
        """With the rank and alpha of this site, and no patterns left."""
        return dataclasses.replace(
            self, rank=self.rank_at(site.path), alpha=self.alpha_at(site.path), ranks=(), alphas=()
        )

    def rank_at(self, path: str) -> int:
        """The rank of the first pattern that matches, else `rank`."""
        from surgeon.select import matches

        return next((rank for pattern, rank in self.ranks if matches(pattern, path)), self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha of the first pattern that matches, else `alpha`."""
        from surgeon.select import matches

        return next((alpha for pattern, alpha in self.alphas if matches(pattern, path)), self.alpha)

    def unfit(self, site: Site) -> str:
        """Raises UsageError for a rank that no [out, in] matrix has."""
        made = self.at(site).bypass(site)
        if made.rank > made.limit:
            raise UsageError(
                f"{self.name}: rank {made.rank} is above the size of the layer",
                f"{site.path} is [{site.out}, {site.inp}]",
                f"a rank of at most {made.limit}, or leave the module out with --exclude",
            )
        return made.unfit()

    def bypass(self, site: Site) -> Bypass:
        """The shapes and nodes of a and b; asked of the pass as `at` leaves it."""
        from surgeon.bypass import bypass_at

        return bypass_at(site, self.rank)

    def cost(self, site: Site) -> Cost:
        """rank · (in + out) parameters, each multiplied once per token; an embedding looks up a column of a."""
        made = self.bypass(site)
        return Cost(rank=self.rank, trained=made.parameters, stored=made.parameters, flops=2 * made.macs)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x → dropout → a → b → · s → + y."""
        made = self.bypass(site)
        low, b = self.low(edit, made)
        edit.replace(edit.add(edit.y, edit.mul(made.up(edit, low, b), self.scale)))

    def low(self, edit: Edit, made: Bypass) -> tuple[fx.Node, fx.Node]:
        """A dropout(x) and b; there is no dropout on token ids."""
        a, b = (edit.param(*given) for given in zip("ab", (made.a, made.b), made.first, strict=True))
        x = edit.x if made.site.kind == EMBEDDING else edit.dropout(edit.x, self.dropout)
        return made.down(edit, x, a), b

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """a and b as they are."""
        from surgeon.normal import Normal

        a, b = self.bypass(site).normal(params["a"], params["b"])
        return Normal(scale=self.scale, a=a, b=b)

    def rate(self, name: str, site: Site | None, lr: float) -> float:
        """As in the code of LoRA+: the ratio is for b and all vectors, and embeddings have a rate of their own."""
        if self.lr_ratio == 1:
            return lr
        if site is not None and site.kind == EMBEDDING:
            return self.lr_embedding
        return lr * self.lr_ratio if name in ("b", "m") or name.endswith(".bias") else lr

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields; ranks and alphas per site as PEFT's patterns."""
        from surgeon.peft_targets import patterns

        at = {site.path: self.at(site) for site in sites}
        return {
            "r": self.rank,
            "lora_alpha": _whole(self.alpha),
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": patterns({path: step.rank for path, step in at.items()}, self.rank),
            "alpha_pattern": patterns({path: _whole(step.alpha) for path, step in at.items()}, _whole(self.alpha)),
            "fan_in_fan_out": any(site.kind == CONV1D for site in sites),
            "init_lora_weights": True,
            "exclude_modules": None,
            "use_dora": False,
            "lora_bias": False,
            "target_parameters": None,
        }

    def peft_keys(self, site: Site) -> dict[str, str]:
        """lora_A and lora_B, which have other names at an embedding."""
        stem = f"model.{site.path}.lora_"
        if site.kind == EMBEDDING:
            return {"a": f"{stem}embedding_A", "b": f"{stem}embedding_B"}
        return {"a": f"{stem}A.weight", "b": f"{stem}B.weight"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Lora:
        """PEFT's patterns are regular expressions over the end of a path; the first that matches wins, as here."""
        if config.get("init_lora_weights", True) not in _PLAIN_INITS:
            raise UnsupportedError(
                f"the adapter was saved with init_lora_weights = {config['init_lora_weights']!r}, to a base it moved",
                "adapter_config.json",
                "save it with PEFT's path_initial_model_for_weight_conversion, which gives a plain LoRA",
            )
        return cls(
            rank=int(config.get("r", 8)),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout") or 0),
            rslora=bool(config.get("use_rslora")),
            ranks=tuple((_suffix(key), int(rank)) for key, rank in (config.get("rank_pattern") or {}).items()),
            alphas=tuple((_suffix(key), float(alpha)) for key, alpha in (config.get("alpha_pattern") or {}).items()),
        )


def _suffix(key: str) -> str:
    return rf"re:(.*\.)?({key})"


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number
