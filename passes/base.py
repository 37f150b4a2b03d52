"""What a pass is: a frozen dataclass whose fields are its options.

The same dataclass gives command-line flags, the manifest on disk and the documentation. Pass files import no torch at
module level, so that listing them costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UsageError, nearest
from surgeon.peft_form import PeftForm

if TYPE_CHECKING:
    import torch

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.hook import Hook
    from surgeon.normal import Base, Columns, Factors, Normal
    from surgeon.sites import Site

# The names of site kinds, repeated here so that pass files need not import torch; surgeon.sites has their meaning.
LINEAR, CONV1D, EMBEDDING, ATTENTION, EXPERTS = "linear", "conv1d", "embedding", "attention", "experts"
CONV = "conv"


@dataclass(frozen=True)
class Skip:
    """A site the pattern named and the pass cannot work on, with the reason."""

    path: str
    why: str


@dataclass(frozen=True)
class Cost:
    """What a pass adds, at one site or once for the model.

    Attributes:
        rank: of the bypass; 0 where there is none.
        trained: parameters that training changes.
        frozen: numbers that are kept in memory beside those.
        stored: numbers in the adapter's file.
        freed: weights of the base that codes stand for, in their place.
        held: bytes of those codes and what belongs to them, in memory.
        saved: the same on disk, in the form that they are saved in by default.
        flops: of a forward pass per token, 2 per multiply-add of a matrix; elementwise operators are not counted.
        span: positions that a token sees at this attention while it trains; 0 leaves them as they are.
    """

    rank: int = 0
    trained: int = 0
    frozen: int = 0
    stored: int = 0
    freed: int = 0
    held: int = 0
    saved: int = 0
    flops: int = 0
    span: int = 0


@dataclass(frozen=True)
class Pass:
    """A rewrite of the graph.

    Class attributes:
        name: as written on the command line and in manifests.
        keeps: what holds when it is inserted: "exact" (same bits), "close" (same up to rounding) or "changes".
        stacks: whether it may be applied to a graph that already has it.
        kinds: kinds of site it works on.
        offered: whether users apply it by its name; the others are surgeon's own.
        training_only: whether it changes nothing but how the model trains, so that what is deployed is without it.
        learning_rate: AdamW's, where the user names none.
        hint_twice: what to try where it is applied already and does not stack.
    """

    name: ClassVar[str] = ""
    keeps: ClassVar[str] = "exact"
    stacks: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ()
    offered: ClassVar[bool] = False
    training_only: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 2e-4
    hint_twice: ClassVar[str] = "start from a graph without it"

    @property
    def derived(self) -> bool:
        """Whether what it inserts follows from the base and its options, and is made anew rather than stored."""
        return False

    def fitted(self, graph: Graph) -> Pass:
        """Asked first: the pass with the options that follow from the graph it is to be applied to."""
        return self

    def requires(self, graph: Graph) -> None:
        """Raise SurgeonError if the graph is not one this pass can be applied to."""

    def match(self, graph: Graph) -> list[Site | Skip]:
        """The sites it will rewrite, and those it was asked for and cannot."""
        from surgeon.sites import sites

        return list(sites(graph, *self.kinds))

    def at(self, site: Site) -> Pass:
        """The pass with its options resolved for one site."""
        return self

    def prepare(self, graph: Graph, chosen: list[Site]) -> Pass:
        """Called once before the sites are rewritten: the pass with what it had to learn from all of them."""
        return self

    def rewrite(self, edit: Edit, site: Site) -> None:
        """Write the nodes of one site, only through `edit`."""

    def virtual_tokens(self, graph: Graph) -> dict[str, int]:
        """Input of token ids → how many virtual tokens the pass puts before them.

        They are part of the first call of a model with a K/V cache, and in the cache for the later ones.
        """
        return {}

    def virtual_outputs(self, graph: Graph) -> int:
        """How many positions of virtual tokens the outputs begin with."""
        return 0

    def cost(self, site: Site) -> Cost:
        """What it adds at one site; asked of the pass as `prepare` and `at` leave it."""
        return Cost()

    def shared_cost(self) -> Cost:
        """What it adds once for all its sites; asked of the pass as `prepare` leaves it."""
        return Cost()

    def finish(self, graph: Graph, owner: str) -> None:
        """Called once after the sites are rewritten: what concerns the whole graph."""

    def initialise(self, graph: Graph, owner: str, seed: int, tokenizer: Any) -> None:
        """Called once after `finish`: first values (`graph.inserted`) that are made from the base's or from text.

        A work folder that is read back is applied again and then filled, so what is put there computes when called and
        not before, and raises UsageError only then if there is no tokenizer.
        """

    def ensures(self, result: Graph) -> None:
        """Raise SurgeonError if the result is not what the pass promises."""

    def options(self) -> dict[str, Any]:
        """Its options by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def spec(self) -> str:
        """The option string, `name(option=value, …)`, of the options that are not at their defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != _default(field)
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    @classmethod
    def make(cls, options: Mapping[str, Any]) -> Pass:
        """The pass with these options.

        Raises:
            UsageError: an option is unknown or has the wrong type.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in options.items():
            if name not in fields:
                raise UsageError(f"{cls.name} has no option '{name}'", "", f"nearest: {nearest(name, fields)}")
            _check_type(cls.name, name, value, _default(fields[name]))
        return cls(**{name: _like(value, _default(fields[name])) for name, value in options.items()})


@dataclass(frozen=True)
class Adapter(PeftForm, Pass):
    """A pass that adds something trainable and has a normal form: `normal` at weights, `columns` at attentions.

    Stacked at one site, the later is the outer: it sees the layer as the earlier ones leave it, in the graph (`edit.y`,
    `edit.feed`) and in the normal form (`Base`).

    Options:
        targets: which modules: names, patterns with * and braces, all-linear (without the head, experts and
            convolutions), attention-linear, all-experts; see `surgeon.select`.
        exclude: modules that are left out even if targeted.
        modules_to_save: modules of the base that train whole and are saved beside the adapter (a new head).
        bias: "none", "sites" (the biases of the adapted modules train too) or "all" (every bias of the model).

    Class attributes:
        folds: whether it folds into weights (`normal`). What does not (`columns`, `rows`) stays an adapter beside
            merged weights.
        whole_weight: whether it is at every site that reads its weight, so that weights that are tied stay tied.
        reads_weight: whether what it inserts reads the layer's weight (a norm of it), so that nothing may change that
            weight below it: applied over another adapter it is refused.
    """

    offered: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    reads_weight: ClassVar[bool] = False
    whole_weight: ClassVar[bool] = False
    targets: str = "*.{q,v}_proj"
    exclude: str = ""
    modules_to_save: str = ""
    bias: str = "none"

    def __post_init__(self) -> None:
        if self.bias not in ("none", "sites", "all"):
            raise UsageError(f"{self.name}: bias is '{self.bias}'", "--bias", "one of none, sites, all")

    def fitted(self, graph: Graph) -> Adapter:
        """A head that the checkpoint has no values for trains with whatever adapter comes first."""
        from surgeon import replaced

        step = dataclasses.replace(self, modules_to_save=replaced.spelled(graph, self.modules_to_save))
        return step.saving(graph, graph.fresh)

    def saving(self, graph: Graph, modules: Sequence[str]) -> Adapter:
        """The adapter with these modules among `modules_to_save`, but for those that train already."""
        from surgeon.replaced import inside

        trains, own = tuple(graph.trainable()), self.modules_to_save
        new = [m for m in modules if not inside(own, m) and not any(name.startswith(f"{m}.") for name in trains)]
        return dataclasses.replace(self, modules_to_save=",".join(dict.fromkeys([*filter(None, [own]), *new])))

    def unfit(self, site: Site) -> str:
        """Why this site cannot be adapted, or ""."""
        return ""

    def unfit_in(self, graph: Graph, site: Site) -> str:
        """As `unfit`, for what takes the graph to know."""
        return self.unfit(site)

    def _unfit_kind(self, site: Site) -> str:
        return "" if site.kind in self.kinds else f"{self.name} has no form at what is of kind {site.kind}"

    def match(self, graph: Graph) -> list[Site | Skip]:
        """The targeted sites; raises UsageError for a pattern that matches nothing."""
        from surgeon.replaced import inside
        from surgeon.sites import WEIGHTED, sites
        from surgeon.targets import targeted, unnamed_experts

        wanted = sites(graph, *(WEIGHTED if set(self.kinds) <= set(WEIGHTED) else self.kinds))
        candidates = [site for site in wanted if not inside(self.modules_to_save, site.path)]
        found = targeted(graph, candidates, self.targets, self.exclude)
        unfit = {site.path: why for site in found if (why := self._unfit_kind(site) or self.unfit_in(graph, site))}
        chosen = [Skip(site.path, unfit[site.path]) if site.path in unfit else site for site in found]
        if not any(not isinstance(item, Skip) for item in chosen):
            raise UsageError(f"{self.name} has no site to work on", reasons(unfit) or self.targets, "other --targets")
        why = "all-linear is without experts: all-experts names them" if EXPERTS in self.kinds else ""
        left = unnamed_experts(graph, self.targets, self.exclude)
        return chosen + [Skip(site.path, why or self._unfit_kind(site)) for site in left]

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """The trained adapter at one site in normal form; `params` by the names given to `edit.param`."""
        raise UsageError(f"{self.name} has no normal form", site.path)

    def shared_factors(self, params: Mapping[str, torch.Tensor], site: Site) -> Factors | None:
        """The normal form as matrices that adapters share; None for a method whose matrices are an adapter's own."""
        return None

    def columns(self, params: Mapping[str, torch.Tensor], site: Site) -> Columns:
        """The trained K/V columns at one attention."""
        raise UsageError(f"{self.name} has no columns", site.path)

    def rows(self, params: Mapping[str, torch.Tensor], site: Site) -> torch.Tensor:
        """The trained rows `[p, hidden]` that stand before the tokens at one embedding."""
        raise UsageError(f"{self.name} has no rows", site.path)

    def params(self, form: Columns | torch.Tensor, site: Site) -> dict[str, torch.Tensor]:
        """The other way: the tensors of a site, by the names given to `edit.param`, that make these columns or rows."""
        raise UsageError(f"{self.name} is not made from columns or rows", site.path)

    def finish(self, graph: Graph, owner: str) -> None:
        """The modules and biases that train whole."""
        from surgeon import replaced

        replaced.train(graph, replaced.names(graph, owner, self))

    def hooks(self, graph: Graph, owner: str, seed: int) -> Sequence[Hook]:
        """What it does around training steps; `owner` is its id in the graph."""
        return ()

    def rate(self, name: str, site: Site | None, lr: float) -> float:
        """The highest learning rate of what trains at a site, by the name given to `edit.param`.

        Without a site `name` is that of a tensor of the base that trains with the adapter.
        """
        return lr

    @property
    def changes_bias(self) -> bool:
        """Whether its normal form has a bias at layers that have one."""
        return False

    @property
    def any_rank(self) -> int:
        """The rank up to which every lower one was trained too; 0 where only one was."""
        return 0

    def active_at(self, rank: int) -> Mapping[str, torch.Tensor]:
        """Shared tensors, by the names given to `edit.shared`, that make it one of a rank of at most `any_rank`."""
        return {}

    def final(self) -> Adapter:
        """Without what only training needs: made of its `columns` or `rows`, with no reparameterisation or dropout."""
        return self


def reasons(unfit: Mapping[str, str]) -> str:
    """Why there is nothing to do at these paths: each reason once, with the first path it holds for."""
    by_why: dict[str, list[str]] = {}
    for path, why in unfit.items():
        by_why.setdefault(why, []).append(path)
    more = {why: f" and {len(paths) - 1} more" if len(paths) > 1 else "" for why, paths in by_why.items()}
    return "; ".join(f"{paths[0]}{more[why]}: {why}" for why, paths in list(by_why.items())[:3])


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _check_type(owner: str, name: str, value: Any, default: Any) -> None:
    wanted = type(default)
    fits = isinstance(value, wanted) or (wanted is float and isinstance(value, int))
    if wanted is int and isinstance(value, bool):
        fits = False
    if not fits and not (wanted is tuple and isinstance(value, (list, dict))):
        raise UsageError(
            f"{owner}: option '{name}' is {value!r}", "", f"give a {wanted.__name__}, for example {default!r}"
        )


def _like(value: Any, default: Any) -> Any:
    """JSON has no tuples, and integers stand for floats."""
    if isinstance(default, tuple):
        items = value.items() if isinstance(value, dict) else value
        return tuple(tuple(item) if isinstance(item, (list, tuple)) else item for item in items)
    return float(value) if isinstance(default, float) else value
