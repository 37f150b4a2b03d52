"""Prefix tuning: softmax(q [P_k; k]ᵀ) [P_v; v], learned columns at every attention (Li & Liang 2021, §4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UnsupportedError, UsageError
from surgeon.passes.base import ATTENTION, Adapter, Cost, Skip

if TYPE_CHECKING:
    import torch
    from torch import fx

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.normal import Columns
    from surgeon.sites import Site

NORMAL, ZEROS = "normal", "zeros"
ROLES = ("encoder", "decoder", "cross")


@dataclass(frozen=True)
class Prefix(Adapter):
    """Learned keys and values before those of the tokens, after rotary; positions of the tokens start at their number.

    Per attention k: `[h_kv, tokens, d]` and v: `[h_kv, tokens, d_v]`. With `hidden` they are the rows of one MLP,
    tanh(E Wᵀ + b) W_kᵀ + b_k, E: `[tokens, e]`, W: `[hidden, e]`, e = h_kv · d, of which every attention has its own
    last rows W_k: `[h_kv · d, hidden]` and W_v: an encoder's, a decoder's and its cross-attentions' are MLPs apart.

    Options:
        tokens: p, the number of columns.
        hidden: width of the MLP that makes the columns while they train; 0 trains them themselves.
        init: first values. "normal": N(0, 1), of E if there is an MLP; "zeros" (which still take part in the softmax).
        dropout: on the columns, while training.
        sites: which attentions: "encoder", "decoder" (over their own tokens), "cross" (over an encoder's states).
    """

    name: ClassVar[str] = "prefix"
    keeps: ClassVar[str] = "changes"
    kinds: ClassVar[tuple[str, ...]] = (ATTENTION,)
    learning_rate: ClassVar[float] = 1e-2
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    peft_prompt: ClassVar[bool] = True
    folds: ClassVar[bool] = False
    targets: str = "*"
    tokens: int = 20
    hidden: int = 0
    init: str = NORMAL
    dropout: float = 0.0
    sites: str = "encoder,decoder,cross"
    width: int = 0
    roles: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens <= 0:
            raise UsageError(f"{self.name}: tokens is {self.tokens}", "--tokens", "at least 1, for example 20")
        if self.hidden < 0:
            raise UsageError(f"{self.name}: hidden is {self.hidden}", "--hidden", "0 for none, or for example 512")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{self.name}: dropout is {self.dropout}", "--dropout", "a probability below 1")
        unknown = [role for role in self._wanted() if role not in ROLES]
        if unknown or not self._wanted():
            raise UsageError(f"{self.name}: sites is '{self.sites}'", "--sites", f"some of {','.join(ROLES)}")

    def _wanted(self) -> list[str]:
        return [role.strip() for role in self.sites.split(",") if role.strip()]

    def requires(self, graph: Graph) -> None:
        """Raise for a graph without attention nodes, with a cache, or with fewer positions than columns."""
        from surgeon import positions
        from surgeon.run import require_node

        require_node(graph, ATTENTION, self.name)
        limit = positions.limit(graph)
        if limit and self.tokens >= limit:
            what = f"{self.name}: {self.tokens} virtual tokens leave no position for text"
            raise UsageError(what, f"{graph.config.model_type} has {limit} positions", "fewer --tokens")
        if any(step.name == "kv_cache" for step in graph.applied):
            what = f"{self.name} stands before what a cache holds, and this graph has its cache already"
            raise UnsupportedError(what, graph.source, f"apply {self.name} first, kv_cache after it")

    def match(self, graph: Graph) -> list[Site | Skip]:
        """The targeted attentions of the wanted roles."""
        wanted, seen = self._wanted(), set[str]()
        found: list[Site | Skip] = []
        for item in super().match(graph):
            if isinstance(item, Skip):
                found.append(item)
            elif item.path in seen:
                found.append(Skip(item.path, "its module has two attentions"))
            elif item.role in wanted:
                found.append(item)
            seen.add(item.path)
        if not any(not isinstance(item, Skip) for item in found):
            raise UsageError(f"{self.name} has no site to work on", f"sites={self.sites}", f"some of {','.join(ROLES)}")
        return found

    def prepare(self, graph: Graph, chosen: list[Site]) -> Prefix:
        """With the roles there are, and the width of the MLP's table: the largest h_kv · d."""
        import dataclasses

        roles = ",".join(role for role in ROLES if any(site.role == role for site in chosen))
        width = max(site.heads * site.inp for site in chosen) if self.hidden else 0
        return dataclasses.replace(self, roles=roles, width=width)

    def cost(self, site: Site) -> Cost:
        """tokens · h_kv · (d + d_v) are stored; a token's query meets every column in every head."""
        numbers = site.heads * (site.inp + site.out)
        stored, flops = self.tokens * numbers, 2 * self.tokens * site.queries * (site.inp + site.out)
        return Cost(trained=numbers * (self.hidden + 1) if self.hidden else stored, stored=stored, flops=flops)

    def shared_cost(self) -> Cost:
        """The table and first matrix of each MLP, which are not stored when training is done."""
        each = self.width * (self.tokens + self.hidden) + self.hidden
        return Cost(trained=each * len(self.roles.split(",")) if self.hidden else 0)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """k, v → cat(P_k, k), cat(P_v, v); masks and biases let every query see the columns."""
        import torch

        aten = torch.ops.aten
        batch = edit.call(aten.sym_size.int, edit.argument(0), 0)
        for position, name, size in ((1, "k", site.inp), (2, "v", site.out)):
            table = self._table(edit, site, name, size)
            rows = edit.dropout(edit.call(aten.expand.default, table, [batch, -1, -1, -1]), self.dropout)
            edit.feed(edit.call(aten.cat.default, [rows, edit.argument(position)], 2))
        if edit.has(3):
            seen = edit.call(aten.new_ones.default, edit.argument(3), [batch, self.tokens])
            edit.feed(edit.call(aten.cat.default, [seen, edit.argument(3)], 1))
        if edit.has(4):
            edit.feed(edit.call(aten.cat.default, [self._unbiased(edit, edit.argument(4)), edit.argument(4)], -1))

    def _unbiased(self, edit: Edit, bias: fx.Node) -> fx.Node:
        """What a bias `[.., t, s]` has for the columns: nothing to add, or that they are seen."""
        import torch

        aten, value = torch.ops.aten, bias.meta["val"]
        if value.shape[-1] == 1:
            what = f"{self.name}: the attention's bias is one for all keys"
            raise UnsupportedError(what, edit.site.path, "leave this attention out with --exclude")
        fill = aten.zeros_like.default if value.is_floating_point() else aten.ones_like.default
        one = edit.call(fill, edit.call(aten.slice.Tensor, bias, -1, 0, 1))
        return edit.call(aten.expand.default, one, [-1] * (value.dim() - 1) + [self.tokens])

    def _table(self, edit: Edit, site: Site, name: str, size: int) -> fx.Node:
        """The columns `[h_kv, tokens, size]` of one attention."""
        import torch

        shape = (site.heads, self.tokens, size)
        if not self.hidden:
            return edit.param(name, shape, self.init)
        bound = f"uniform:{self.hidden**-0.5}"
        features = edit.once(f"{site.role}_features", lambda trunk: self._features(trunk, site.role))
        weight = edit.param(f"{name}_weight", (site.heads * size, self.hidden), bound if self.init == NORMAL else ZEROS)
        bias = edit.param(f"{name}_bias", (site.heads * size,), bound if self.init == NORMAL else ZEROS)
        rows = edit.call(torch.ops.aten.linear.default, features, weight, bias)
        split = edit.call(torch.ops.aten.view.default, rows, [self.tokens, site.heads, size])
        return edit.call(torch.ops.aten.transpose.int, split, 0, 1)

    def _features(self, trunk: Edit, role: str) -> fx.Node:
        """tanh(E Wᵀ + b) `[tokens, hidden]`."""
        import torch

        bound = f"uniform:{self.width**-0.5}"
        table = trunk.shared(f"{role}_table", (self.tokens, self.width), NORMAL, trainable=True)
        weight = trunk.shared(f"{role}_weight", (self.hidden, self.width), bound, trainable=True)
        bias = trunk.shared(f"{role}_bias", (self.hidden,), bound, trainable=True)
        rows = trunk.call(torch.ops.aten.linear.default, table, weight, bias)
        return trunk.call(torch.ops.aten.tanh.default, rows)

    def finish(self, graph: Graph, owner: str) -> None:
        """Tokens are numbered from `tokens` on; an encoder's keep their numbers where there is a decoder."""
        from surgeon import positions

        super().finish(graph, owner)
        alone = "decoder_input_ids" not in graph.inputs
        if "decoder" in self.roles or (alone and "encoder" in self.roles):
            positions.shift(graph, owner, self.tokens)

    def columns(self, params: Mapping[str, torch.Tensor], site: Site) -> Columns:
        """The columns as they are, or as the MLP makes them."""
        from surgeon.normal import Columns

        return Columns(self._columns(params, site, "k"), self._columns(params, site, "v"))

    def _columns(self, params: Mapping[str, torch.Tensor], site: Site, name: str) -> torch.Tensor:
        import torch

        if not self.hidden:
            return params[name]
        table, weight, bias = (params[f"{site.role}_{part}"] for part in ("table", "weight", "bias"))
        features = torch.tanh(torch.nn.functional.linear(table, weight, bias))
        rows = torch.nn.functional.linear(features, params[f"{name}_weight"], params[f"{name}_bias"])
        return rows.unflatten(1, (site.heads, -1)).transpose(0, 1)

    def final(self) -> Prefix:
        """The columns themselves."""
        import dataclasses

        return dataclasses.replace(self, hidden=0, width=0, dropout=0.0)

    def params(self, form: Any, site: Site) -> dict[str, torch.Tensor]:
        """The columns as they are."""
        return {"k": form.k, "v": form.v}

    def peft_config(self, sites: Sequence[Site]) -> dict[str, Any]:
        """PEFT's fields; its file has the columns and no MLP, which makes them a prefix without one."""
        return {"encoder_hidden_size": None, "init_weights": None, "prefix_projection": False}

    @property
    def peft_lossy(self) -> bool:
        """The MLP cannot be had back from the columns it makes."""
        return bool(self.hidden)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Prefix:
        """PEFT's prefix of an encoder-decoder reaches the decoder's self-attention alone."""
        both = config.get("task_type") == "SEQ_2_SEQ_LM" or config.get("num_transformer_submodules") == 2
        return cls(tokens=int(config["num_virtual_tokens"]), sites="decoder" if both else cls.sites)
