"""LoRA: y = W x + s · B A dropout(x), with s = alpha / rank (Hu et al. 2021, eq. 3)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from surgeon.errors import UnsupportedError, UsageError
from surgeon.passes.base import CONV, CONV1D, EMBEDDING, EXPERTS, LINEAR, Adapter, Cost

if TYPE_CHECKING:
    import torch
    from torch import fx

    from surgeon.bypass import Bypass
    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.normal import Base, Normal
    from surgeon.sites import Site

KAIMING, GAUSSIAN = "kaiming", "gaussian"
# Of a and b together, at linears (see `surgeon.first_factors`); the first two begin with a part of the weight.
_PAIRS = ("pissa", "olora", "orthogonal", "loftq")


@dataclass(frozen=True)
class Lora(Adapter):
    """A low-rank bypass beside a linear, an embedding, a layer's experts or a convolution.

    a: `[rank, in]` ~ U(−1/√in, 1/√in), b: `[out, rank]` = 0, so the model is unchanged until trained. The paper draws a
    from a Gaussian; this is the initialisation of its code and of PEFT. At an embedding a `[rank, vocab]` = 0 and
    b `[out, rank]` ~ N(0, 1).

    With `pissa` and `olora` a and b begin as the leading part of W, which a second pair that does not train takes away
    again: y = W x + s · (b a − b0 a0) x.

    Kept for itself: `layouts`, (pattern, layout) pairs that say which outputs of a projection belong to which part;
    `oversized`, set on what PEFT wrote, which has ranks above any that a change of the layer can have.

    Options:
        rank: r.
        alpha: the numerator of the scale alpha / rank.
        dropout: on the adapter's input, while training.
        rslora: scale alpha / √rank instead (Kalajdzievski 2023, eq. 2).
        ranks: (pattern, rank) pairs that override `rank` where the pattern matches a module's path; the first wins.
        alphas: likewise for `alpha`.
        lr_ratio: the learning rate of b over that of a, as in LoRA+ (Hayou et al. 2024), which has 16; 1 for one rate.
        lr_embedding: the learning rate of a and b at embeddings, where `lr_ratio` is not 1.
        lr_saved: the learning rate of modules_to_save and biases over that of a; whole weights want a lower one.
        parts: of fused projections, those to adapt, `q,v` for example: each with a bypass of `rank` of its own, the
            others with none, as in the paper's code (MergedLinear). Empty: one bypass for all outputs.
        init: first values. "kaiming": as above; "gaussian": a ~ N(0, 1/r²); "orthogonal": neither is 0, their product
            is; "pissa": the largest singular values of W (Meng et al. 2024), "pissa_niter_4" by a randomised SVD of so
            many rounds; "olora": the QR decomposition of W (Büyükakyüz 2024); "loftq": over a quantised base, what
            quantising took from W (Li et al. 2023, one iteration: the base's codes stay); "eva:data.jsonl": the
            directions that most of the layers' inputs lie in, for a data file (Paischer et al. 2024).
        rho: with "eva:…", by what factor a site's rank may grow, on account of others; 1 leaves all ranks as they are.
        experts: of layers of experts, those to adapt by number, `0,3` or `0-3,6`; the others stay. Empty: all.
        lora_bias: beside B A a bias c `[out]` = 0 that trains, y + s · (B A x + c), at layers that have a bias.
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    peft_bias: ClassVar[str] = "lora_only"
    peft_packed: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = (LINEAR, CONV1D, EMBEDDING, EXPERTS, CONV)
    least_rank: ClassVar[int] = 1
    has_parts: ClassVar[bool] = True
    has_bias: ClassVar[bool] = True
    inits: ClassVar[tuple[str, ...]] = (KAIMING, GAUSSIAN, *_PAIRS, "eva")
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    lr_ratio: float = 1.0
    lr_embedding: float = 1e-6
    lr_saved: float = 1.0
    parts: str = ""
    init: str = KAIMING
    rho: float = 2.0
    lora_bias: bool = False
    experts: str = ""
    layouts: tuple[tuple[str, str], ...] = ()
    oversized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        from surgeon.lora_options import check

        check(self)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The words of `parts`."""
        return tuple(filter(None, self.parts.replace(" ", ",").split(",")))

    @property
    def moves(self) -> bool:
        """Whether a and b begin with a part of the weight, which a0 and b0 take away."""
        return self.init.startswith(("pissa", "olora"))

    @property
    def recodes(self) -> bool:
        """Whether the base's codes are made anew, from what a0 and b0 leave over."""
        return self.init.startswith("loftq_iter_") and self.init != "loftq_iter_1"

    @property
    def changes_bias(self) -> bool:
        """Where the adapter has one."""
        return self.lora_bias

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / √rank."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def at(self, site: Site) -> Lora:
        """With the rank and alpha of this site, and no patterns left."""
        from surgeon.select import matches

        layouts = tuple(("*", layout) for pattern, layout in self.layouts if matches(pattern, site.path))[:1]
        rank, alpha = self.rank_at(site.path), self.alpha_at(site.path)
        return dataclasses.replace(self, rank=rank, alpha=alpha, ranks=(), alphas=(), layouts=layouts)

    def rank_at(self, path: str) -> int:
        """The rank of the first pattern that matches, else `rank`."""
        from surgeon.select import matches

        return next((rank for pattern, rank in self.ranks if matches(pattern, path)), self.rank)

    def alpha_at(self, path: str) -> float:
        """The alpha of the first pattern that matches, else `alpha`."""
        from surgeon.select import matches

        return next((alpha for pattern, alpha in self.alphas if matches(pattern, path)), self.alpha)

    def unfit_in(self, graph: Graph, site: Site) -> str:
        """As `unfit`, at the parts asked for."""
        if self.init.startswith("loftq"):
            from surgeon.moved import unfit_for_loftq

            if why := unfit_for_loftq(graph, site):
                return why
        if not self.wanted or self.layouts:
            return self.unfit(site)
        from surgeon.parts import layout_of

        if site.kind not in (LINEAR, CONV1D):
            return "it is no linear, and has no parts"
        try:
            layout = layout_of(graph, site)
        except UnsupportedError as error:
            return error.what
        if not set(layout.parts) & set(self.wanted):
            return f"it computes {', '.join(layout.parts)} alone"
        return dataclasses.replace(self, layouts=(("*", str(layout)),)).unfit(site)

    def requires(self, graph: Graph) -> None:
        """Raise UsageError for data that is not named."""
        if self.init == "eva" and not self.ranks:
            raise UsageError(f"{self.name}: init is 'eva', and names no data", "--init", "eva:FILE.jsonl")

    def prepare(self, graph: Graph, chosen: list[Site]) -> Self:
        """With the layouts of the projections, and the ranks that data asks for."""
        if self.init.startswith("eva:"):
            from surgeon import eva

            return cast(Self, eva.prepared(graph, self, chosen))
        if self.experts and not any(site.kind == EXPERTS for site in chosen):
            what = f"{self.name}: experts {self.experts} are named, and no target is a layer's experts"
            raise UsageError(what, "--experts", "--targets '*.experts.*', or leave it out")
        if not self.wanted or self.layouts:
            return self
        from surgeon.parts import layout_of
        from surgeon.select import by_pattern

        found = {site.path: str(layout_of(graph, site)) for site in chosen}
        return dataclasses.replace(self, layouts=by_pattern(found))

    def unfit(self, site: Site) -> str:
        """Raises UsageError for a rank that no [out, in] matrix has, and for an expert that there is not."""
        made = self.at(site).bypass(site)
        if made.rank > made.limit and not self.oversized:
            leaf = site.path.rpartition(".")[2]
            raise UsageError(
                f"{self.name}: rank {made.rank} is above the size of the layer",
                f"{site.path} is [{site.out}, {site.inp}]",
                f"a rank of at most {made.limit}, here alone with --ranks '{leaf}={made.limit}', or --exclude {leaf}",
            )
        if self.init.startswith((*_PAIRS, "eva")) and (
            site.kind not in (LINEAR, CONV1D) or made.whole_rank != made.rank
        ):
            return f"init={self.init} is for whole linears"
        if self.lora_bias and (site.kind in (EMBEDDING, EXPERTS) or site.weight.endswith("in_proj_weight")):
            return "an adapter has no bias there"
        if self.lora_bias and not (site.bias or self.oversized):
            return "it has no bias that the adapter's could be merged into"
        if self.init == "orthogonal" and made.rank % 2:
            raise UsageError(f"{self.name}: rank {made.rank} is odd", f"{site.path}, --init orthogonal", "an even rank")
        return made.unfit()

    def bypass(self, site: Site) -> Bypass:
        """The shapes and nodes of a and b; asked of the pass as `at` leaves it."""
        from surgeon.bypass import bypass_at
        from surgeon.parts import Layout

        layout = Layout.parse(self.layouts[0][1]) if self.layouts else None
        return bypass_at(site, self.rank, layout, self.wanted, self.experts)

    def cost(self, site: Site) -> Cost:
        """rank · (in + out) parameters, each multiplied once per token; an embedding looks up a column of a."""
        made, extra = self.bypass(site), site.out if self.lora_bias else 0
        count, pairs = made.parameters, 2 if self.moves else 1
        frozen = count if self.moves or self.recodes else 0
        return Cost(self.rank, count + extra, frozen, count + frozen + extra, flops=2 * pairs * made.macs)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """x → dropout → a → b → · s → + y."""
        made = self.bypass(site)
        low, b = self.low(edit, made)
        total = edit.add(edit.y, edit.mul(made.up(edit, low, b), self.scale))
        if self.lora_bias:
            total = edit.add(total, edit.mul(made.bias(edit, edit.param("c", (site.out,), "zeros")), self.scale))
        edit.replace(total)

    def low(self, edit: Edit, made: Bypass) -> tuple[fx.Node, fx.Node]:
        """A dropout(x) and b; there is no dropout on token ids."""
        a, b = self.factors(edit, made)
        x = edit.x if made.site.kind == EMBEDDING else edit.dropout(edit.x, self.dropout)
        return made.down(edit, x, a), b

    def factors(self, edit: Edit, made: Bypass) -> tuple[fx.Node, fx.Node]:
        """a and b; with the part that does not train behind the one that does, where they begin with a part of W."""
        import torch

        first = ("gaussian", "zeros") if self.init == GAUSSIAN and made.first[0] == KAIMING else made.first
        a, b = (edit.param(*given) for given in zip("ab", (made.a, made.b), first, strict=True))
        if self.recodes:
            edit.keep("a0", made.a)
            edit.keep("b0", made.b)
        if not self.moves:
            return a, b
        cat = torch.ops.aten.cat.default
        a = edit.call(cat, [a, edit.param("a0", made.a, "zeros", trainable=False)], 0)
        return a, edit.call(cat, [b, edit.param("b0", made.b, "zeros", trainable=False)], 1)

    def initialise(self, graph: Graph, owner: str, seed: int, tokenizer: Any) -> None:
        """Pairs that are made together."""
        if self.init.startswith((*_PAIRS, "eva")):
            from surgeon.moved import first_values

            first_values(graph, owner, self, seed)

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """a and b as they are."""
        from surgeon.normal import Normal

        a, b = params["a"], params["b"]
        if self.moves:
            import torch

            a, b = torch.cat([a, params["a0"]]), torch.cat([b, params["b0"]], 1)
        a, b = self.bypass(site).normal(a, b)
        if not self.lora_bias:
            return Normal(scale=self.scale, a=a, b=b)
        bias, own = base.bias(), params["c"].float() * self.scale
        return Normal(scale=self.scale, a=a, b=b, bias=own if bias is None else bias.float() + own)

    def rate(self, name: str, site: Site | None, lr: float) -> float:
        """As in the code of LoRA+: the ratio is for b and all vectors, and embeddings have a rate of their own."""
        if site is None:
            lr *= self.lr_saved
        if self.lr_ratio == 1:
            return lr
        if site is not None and site.kind == EMBEDDING:
            return self.lr_embedding
        return lr * self.lr_ratio if name in ("b", "c", "m") or name.endswith(".bias") else lr

    @property
    def peft_lossy(self) -> bool:
        """PEFT's file has both pairs as one LoRA of twice the rank."""
        return self.moves

    def in_peft(self, graph: Graph, owner: str) -> tuple[Graph, Adapter]:
        """Both pairs as one LoRA."""
        from surgeon.moved import as_one_pair

        return as_one_pair(graph, owner, self) if self.moves else (graph, self)

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields."""
        from surgeon import peft_lora

        return peft_lora.config(self, sites)

    def peft_keys(self, site: Site) -> dict[str, str]:
        """lora_A and lora_B."""
        from surgeon import peft_lora

        return {**peft_lora.keys(site), **({"c": f"model.{site.module}.lora_B.bias"} if self.lora_bias else {})}

    def peft_unfit(self, task: str) -> str:
        """Why PEFT has no place for what these options do."""
        return "the base's codes are not those that its weights have" if self.recodes else super().peft_unfit(task)

    def packed(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """As `Bypass.packed`."""
        return tensor if name == "c" else self.bypass(site).packed(name, tensor)

    def unpacked(self, name: str, tensor: torch.Tensor, site: Site) -> torch.Tensor:
        """As `Bypass.unpacked`."""
        return tensor if name == "c" else self.bypass(site).unpacked(name, tensor)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Lora:
        """PEFT's fields by surgeon's names."""
        from surgeon import peft_lora

        return cls(**peft_lora.options(config))
