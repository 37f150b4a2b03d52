"""VeRA: y = W x + λ_b ⊙ (B (λ_d ⊙ (A x))), with A and B random, frozen and shared (Kopiczko et al. 2024, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError
from surgeon.passes.base import CONV1D, LINEAR, Adapter, Cost

if TYPE_CHECKING:
    import torch

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.normal import Base, Factors, Normal
    from surgeon.sites import Site


@dataclass(frozen=True)
class Vera(Adapter):
    """Two trained vectors per linear around one random pair that all of them share.

    A: `[rank, max in]`, B: `[max out, rank]`, drawn as PEFT draws them (see `projections`) and sliced for smaller
    layers; λ_d: `[rank]` = d_initial, λ_b: `[out]` = 0. There is no alpha. The paper draws one pair per shape; slices
    of the largest keep one pair for all, as PEFT does, and files are interchangeable.

    Options:
        rank: r.
        d_initial: first value of λ_d (the paper's ablation: 0.1).
        dropout: on the adapter's input, while training.
        key: seed of A and B.
        save_projection: store A and B with the adapter; without, readers draw them again from the key.
    """

    name: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    peft_bias: ClassVar[str] = "vera_only"
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D)
    learning_rate: ClassVar[float] = 1e-2
    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    key: int = 0
    save_projection: bool = True
    max_in: int = 0
    max_out: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank <= 0:
            raise UsageError(f"vera: rank is {self.rank}", "--rank", "a rank of at least 1, for example 256")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"vera: dropout is {self.dropout}", "--dropout", "a probability below 1, e.g. 0.05")

    def prepare(self, graph: Graph, chosen: list[Site]) -> Vera:
        """With the shapes of A and B: the largest input and output among the sites."""
        import dataclasses

        inp, out = max(site.inp for site in chosen), max(site.out for site in chosen)
        if self.max_in and (self.max_in < inp or self.max_out < out):
            raise UsageError(
                f"vera: the shared matrices are for {self.max_out} × {self.max_in}",
                f"a site needs {out} × {inp}",
                "apply vera to all sites at once",
            )
        return self if self.max_in else dataclasses.replace(self, max_in=inp, max_out=out)

    def cost(self, site: Site) -> Cost:
        """rank + out parameters; x passes through slices of A and B."""
        count, macs = self.rank + site.out, self.rank * (site.inp + site.out)
        return Cost(rank=self.rank, trained=count, stored=count, flops=2 * macs)

    def shared_cost(self) -> Cost:
        """A and B, which are not trained: rank · (max in + max out)."""
        count = self.rank * (self.max_in + self.max_out)
        return Cost(frozen=count, stored=count if self.save_projection else 0)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x → A → ⊙ λ_d → B → ⊙ λ_b → + y."""
        rank, inp, out, key = self.rank, self.max_in, self.max_out, self.key
        a = edit.shared("A", (rank, inp), lambda: projections(rank, inp, out, key)[0])
        b = edit.shared("B", (out, rank), lambda: projections(rank, inp, out, key)[1])
        d = edit.param("d", (rank,), f"constant:{self.d_initial}")
        gain = edit.param("b", (site.out,), "zeros")
        low = edit.mul(edit.linear(edit.dropout(edit.x, self.dropout), edit.rows(a, site.inp, 1)), d)
        edit.replace(edit.add(edit.y, edit.mul(edit.linear(low, edit.rows(b, site.out)), gain)))

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """a = diag(λ_d) A, b = diag(λ_b) B."""
        from surgeon.normal import Normal

        low, high = params["A"][:, : site.inp].float(), params["B"][: site.out].float()
        return Normal(a=params["d"].float()[:, None] * low, b=params["b"].float()[:, None] * high)

    def shared_factors(self, params: Mapping[str, torch.Tensor], site: Site) -> Factors:
        """Slices of A and B, named by what they are drawn from or, where a file has others, by what is in them."""
        import hashlib

        from surgeon.normal import Factors

        a, b = params["A"].float(), params["B"].float()
        told = hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).hexdigest()[:16]
        return Factors(a[:, : site.inp], b[: site.out], params["d"].float(), params["b"].float(), f"vera.{told}")

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields."""
        return {
            "r": self.rank,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "projection_prng_key": self.key,
            "save_projection": self.save_projection,
            "fan_in_fan_out": any(site.kind == CONV1D for site in sites),
            "init_weights": True,
        }

    def peft_keys(self, site: Site) -> dict[str, str]:
        """λ_d and λ_b of the site, and the shared pair if it is saved."""
        stem = f"model.{site.path}.vera_lambda_"
        shared = {"A": "vera_A", "B": "vera_B"} if self.save_projection else {}
        return {**shared, "d": f"{stem}d", "b": f"{stem}b"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Vera:
        """PEFT's fields by surgeon's names."""
        return cls(
            rank=int(config.get("r", 256)),
            d_initial=float(config.get("d_initial", 0.1)),
            dropout=float(config.get("vera_dropout") or 0),
            key=int(config.get("projection_prng_key", 0)),
            save_projection=bool(config.get("save_projection", True)),
        )


def projections(rank: int, inp: int, out: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A `[rank, inp]` and B `[out, rank]` from a seed, bit-equal to PEFT's.

    One CPU generator; A first, then B, each U(−√(6 / n), √(6 / n)) with n its number of columns.
    """
    import math

    import torch

    generator = torch.Generator().manual_seed(key)

    def draw(rows: int, columns: int) -> torch.Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return draw(rank, inp), draw(out, rank)
