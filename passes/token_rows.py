"""Trainable token rows: some rows of an embedding train, and a head that is tied to it follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UnsupportedError, UsageError
from surgeon.passes.base import EMBEDDING, LINEAR, Adapter, Cost, Skip

if TYPE_CHECKING:
    import torch
    from torch import fx

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.normal import Base, Normal
    from surgeon.sites import Site

BASE, NORMAL = "base", "normal"


@dataclass(frozen=True)
class TokenRows(Adapter):
    """Rows of an embedding in place of the base's: `[tokens, hidden]`, those of the tokens that are named.

    All sites that read the table (a tied head, an encoder's and a decoder's embedding) see the new rows. No step makes
    or copies the table: what it gives for these tokens is replaced, in the embedding's result and in the logits.

    Options:
        tokens: the tokens, separated by commas, by text (looked up in the base's tokenizer) or by index.
        targets: the embedding; the one of the input ids where none is named.
        init: first values. "base": the base's rows; "normal": N(0, 1).
    """

    name: ClassVar[str] = "token_rows"
    keeps: ClassVar[str] = "close"
    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    peft_host: ClassVar[str] = "LORA"
    peft_lacks: ClassVar[tuple[str, ...]] = ("bias", "layers_pattern", "layers_to_transform", "modules_to_save")
    kinds: ClassVar[tuple[str, ...]] = (EMBEDDING,)
    whole_weight: ClassVar[bool] = True
    targets: str = ""
    tokens: str = ""
    init: str = BASE
    readers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in (BASE, NORMAL):
            raise UsageError(f"token_rows: init is '{self.init}'", "--init", f"use {BASE} or {NORMAL}")

    def fitted(self, graph: Graph) -> Adapter:
        """With the embedding by its path, and the tokens by their indices."""
        from surgeon.vocabulary import token_ids

        step = super().fitted(graph)
        assert isinstance(step, TokenRows)
        site = step._table(graph)
        indices = token_ids(self.tokens, site.inp, graph.source)
        return dataclasses.replace(step, targets=site.path, tokens=",".join(map(str, indices)))

    def _table(self, graph: Graph) -> Site:
        from surgeon.select import check_words, matches
        from surgeon.sites import sites

        every = sites(graph, EMBEDDING)
        found = [site for site in every if self.targets and matches(self.targets, site.path)]
        if not found:  # what is named is another method's
            check_words(self.targets, [site.path for site in (*every, *sites(graph))])
            found = [site for site in every if site.layer == "" and _reads_ids(graph, site)]
        tables = {site.weight: site for site in reversed(found) if not matches(self.exclude, site.path)}
        if not tables:
            raise UsageError("token_rows has no site to work on", self.exclude, "name the embedding with --targets")
        if len(tables) > 1:
            what = f"{len(tables)} embeddings are meant: {', '.join(tables)}"
            raise UsageError(what, f"--targets {self.targets}".strip(), "one at a time: apply token_rows to each")
        return next(iter(tables.values()))

    def match(self, graph: Graph) -> list[Site | Skip]:
        """The embedding; what else reads its table follows in `finish`."""
        return [self._table(graph)]

    @property
    def indices(self) -> tuple[int, ...]:
        """The rows; asked of the pass as `fitted` leaves it."""
        return tuple(int(word) for word in self.tokens.split(","))

    def cost(self, site: Site) -> Cost:
        """tokens · hidden parameters; a head multiplies each row again."""
        count = len(self.indices) * site.out
        return Cost(trained=count, stored=count, flops=2 * count * self.readers)

    def prepare(self, graph: Graph, chosen: list[Site]) -> TokenRows:
        """With the number of heads that follow."""
        return dataclasses.replace(self, readers=sum(s.kind == LINEAR for s in _readers(graph, chosen[0])))

    def rewrite(self, edit: Edit, site: Site) -> None:
        """The row of every token that has one, in place of what the embedding returns."""
        import torch

        aten = torch.ops.aten
        rows = edit.shared("rows", (len(self.indices), site.out), "zeros", trainable=True)
        slots = _whole_numbers(edit.shared("slots", (site.inp,), _Slots(self.indices, site.inp)))
        slot = edit.call(aten.index.Tensor, slots, [edit.x])
        own = edit.call(aten.embedding.default, rows, edit.call(aten.clamp_min.default, slot, 0))
        named = edit.call(aten.unsqueeze.default, edit.call(aten.ge.Scalar, slot, 0), -1)
        edit.replace(edit.call(aten.where.self, named, own, edit.y))

    def finish(self, graph: Graph, owner: str) -> None:
        """Everything else that reads the table."""
        from surgeon.edit import Edit

        super().finish(graph, owner)
        first = self._table(graph)
        for site in _readers(graph, first):
            if site.layer:
                raise UnsupportedError("a layer reads the table of the tokens", site.path, "leave token_rows out")
            edit = Edit(graph, graph.trunk, [""], owner, site, 0)
            if site.kind == EMBEDDING:
                self.rewrite(edit, site)
            else:
                self._follow(edit, site)
        import torch

        for word in ("slots", "index"):
            name = f"{owner}.{word}"
            if name in graph.tensors:
                spec = graph.tensors[name]
                graph.tensors[name] = dataclasses.replace(spec, dtype=torch.int64, persistent=False)

    def _follow(self, edit: Edit, site: Site) -> None:
        """x rowsᵀ + bias in place of the logits of the tokens that have a row."""
        import torch

        aten = torch.ops.aten
        rows = edit.shared("rows", (len(self.indices), site.inp), "zeros", trainable=True)
        index = _whole_numbers(edit.shared("index", (len(self.indices),), _Index(self.indices)))
        bias = [] if edit.bias is None else [edit.call(aten.index_select.default, edit.bias, 0, index)]
        own = edit.call(aten.linear.default, edit.x, rows, *bias)
        edit.replace(edit.call(aten.index_copy.default, edit.y, -1, index, own))

    def initialise(self, graph: Graph, owner: str, seed: int, tokenizer: Any) -> None:
        """The rows of the base."""
        from surgeon.initial import Initial

        name, site = f"{owner}.rows", self._table(graph)
        if self.init == NORMAL:
            graph.inserted[name] = Initial("normal", graph.tensors[name].shape, seed, name)
        else:
            graph.inserted[name] = _BaseRows(graph, site.weight, self.indices)

    def normal(self, params: Mapping[str, torch.Tensor], site: Site, base: Base) -> Normal:
        """The rows in place of the table's: its rows are inputs of an embedding and outputs of a head."""
        import torch

        from surgeon.normal import Normal, Replaced

        axis, values = (-1, params["rows"].t()) if site.kind == EMBEDDING else (-2, params["rows"])
        return Normal(replaced=Replaced(axis, torch.tensor(self.indices), values))

    def peft_unfit(self, task: str) -> str:
        """PEFT trains rows and nothing else."""
        return "its trainable tokens train nothing else" if self.modules_to_save or self.bias != "none" else ""

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields."""
        return {"token_indices": list(self.indices), "target_modules": [self.targets], "init_weights": True}

    def peft_keys(self, site: Site) -> dict[str, str]:
        """The rows, once for all who read them."""
        return {"rows": f"model.{site.path}.trainable_tokens_delta"} if site.path == self.targets else {}

    def peft_copies(self, site: Site) -> tuple[str, ...]:
        """PEFT's stand-alone method stores the rows of a tied head again."""
        return () if site.path == self.targets else (f"model.{site.path}.trainable_tokens_delta",)

    def peft_part(self) -> tuple[str, dict[str, Any]]:
        """In LoRA's file the rows lie in a wrapper of the embedding."""
        return "token_adapter.", {"trainable_token_indices": {self.targets: list(self.indices)}}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> TokenRows:
        """PEFT's indices."""
        return cls(tokens=",".join(str(index) for index in config.get("token_indices") or []))


# Operators that leave ids what they are.
_SAME_IDS = ("view", "reshape", "to", "clone", "contiguous", "alias", "detach", "unsqueeze", "squeeze", "masked_fill")


def _reads_ids(graph: Graph, site: Site) -> bool:
    """Whether an embedding looks up the ids of the input, and not positions or types of tokens."""
    node = next(node for node in graph.trunk.nodes if node.name == site.node)
    ids: Any = node.args[1]
    while ids.op == "call_function" and getattr(ids.target, "__name__", "").partition(".")[0] in _SAME_IDS:
        ids = ids.args[0]
    return ids.op == "placeholder" and str(ids.target).endswith("input_ids")


def _readers(graph: Graph, table: Site) -> list[Site]:
    """The other sites that read a table."""
    from surgeon.sites import sites

    return [s for s in sites(graph) if s.weight == table.weight and (s.path, s.node) != (table.path, table.node)]


def _whole_numbers(node: fx.Node) -> fx.Node:
    """A tensor of the pass that holds whole numbers, for what is computed of shapes and dtypes."""
    import torch

    node.meta["val"] = node.meta["val"].to(torch.int64)
    return node


@dataclass(frozen=True)
class _Slots:
    """For every token of the vocabulary the position of its row, −1 for none."""

    indices: tuple[int, ...]
    size: int

    def __call__(self) -> torch.Tensor:
        import torch

        slots = torch.full((self.size,), -1)
        slots[list(self.indices)] = torch.arange(len(self.indices))
        return slots


@dataclass(frozen=True)
class _Index:
    """The tokens that have a row."""

    indices: tuple[int, ...]

    def __call__(self) -> torch.Tensor:
        import torch

        return torch.tensor(self.indices)


@dataclass(frozen=True)
class _BaseRows:
    """Rows of the base's table, in fp32."""

    graph: Graph
    weight: str
    indices: tuple[int, ...]

    def __call__(self) -> torch.Tensor:
        from surgeon.fold import value_of

        return value_of(self.graph, self.weight)[list(self.indices)].float()
