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

NORMAL, ZEROS, TEXT, GATED = "normal", "zeros", "text:", "gated"
ROLES = ("encoder", "decoder", "cross")


@dataclass(frozen=True)
class Prefix(Adapter):
    """Learned keys and values before those of the tokens, after rotary; positions of the tokens start at their number.

    Per attention k: `[h_kv, tokens, d]` and v: `[h_kv, tokens, d_v]`. With `hidden` they are the rows of one MLP,
    tanh(E Wᵀ + b) W_kᵀ + b_k, E: `[tokens, e]`, W: `[hidden, e]`, e = h_kv · d, of which every attention has its own
    last rows W_k: `[h_kv · d, hidden]` and W_v: an encoder's, a decoder's and its cross-attentions' are MLPs apart.

    A gate g: `[h_kv, tokens]` = 0 makes each column's exponential |g| times as large and gives its value g's sign:
    with a = √(g² + ε²), log a is added to its scores, and v is multiplied by g / a. At g = 0 that is the base, and the
    gradient of g is that of adding g · exp(score) · v to the numerator of the softmax. Tokens keep their positions.

    Options:
        tokens: p, the number of columns.
        hidden: width of the MLP that makes the columns while they train; 0 trains them themselves.
        init: first values. "normal": N(0, 1), of E if there is an MLP; "zeros" (which still take part in the softmax);
            "text:…": the keys and values of a text, cut or repeated to p; "gated", "gated:text:…": behind a gate that
            starts closed, so that the first step sees the base.
        dropout: on the columns, while training.
        windowed: a sliding window hides the columns as it hides tokens, as in PEFT; otherwise every query sees them.
        biased: position biases (T5) see the columns as tokens before the text, as in PEFT; otherwise theirs is 0.
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
    windowed: bool = True
    biased: bool = False
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
        if self._drawn() not in (NORMAL, ZEROS) and not self._drawn().startswith(TEXT):
            known = f"{NORMAL}, {ZEROS}, {TEXT}…, {GATED} or {GATED}:{TEXT}…"
            raise UsageError(f"{self.name}: init is '{self.init}'", "--init", known)
        unknown = [role for role in self._wanted() if role not in ROLES]
        if unknown or not self._wanted():
            raise UsageError(f"{self.name}: sites is '{self.sites}'", "--sites", f"some of {','.join(ROLES)}")

    @property
    def gated(self) -> bool:
        """Whether the columns are behind a gate."""
        return self.init == GATED or self.init.startswith(f"{GATED}:")

    @property
    def _hidden(self) -> bool:
        """Whether a window hides the columns, and chunks are counted from them. Behind a gate they change nothing."""
        return self.windowed and not self.gated

    def _drawn(self) -> str:
        """The first values without the gate."""
        return (self.init.removeprefix(GATED).removeprefix(":") or NORMAL) if self.gated else self.init

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
        for step in [step for step in graph.applied if isinstance(step, Prefix)]:
            if step.gated or self.gated:
                what = f"{self.name}: columns behind a gate stand alone, and these would stand beside others"
                raise UnsupportedError(what, step.spec(), "one of the two without init=gated, or more tokens in one")
            if step.windowed != self.windowed:
                what = f"{self.name}: a window would hide some columns and not others"
                raise UnsupportedError(what, step.spec(), "the same windowed for both")

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

        from surgeon.columns import shares_biases

        if shares_biases(graph, every=self.biased):
            self._check_whole(graph, chosen)
        roles = ",".join(role for role in ROLES if any(site.role == role for site in chosen))
        width = max(site.heads * site.inp for site in chosen) if self.hidden else 0
        return dataclasses.replace(self, roles=roles, width=width)

    def _check_whole(self, graph: Graph, chosen: list[Site]) -> None:
        """Layers share position biases: raise UsageError if some of them are left out."""
        from surgeon.sites import sites

        paths, roles = {site.path for site in chosen}, {site.role for site in chosen} - {"cross"}
        left = [site.path for site in sites(graph, ATTENTION) if site.role in roles and site.path not in paths]
        if left:
            what = f"{self.name}: layers share the position biases, and some are left out"
            raise UsageError(what, left[0], "every attention of the kind; for T5 also biased=False")

    def cost(self, site: Site) -> Cost:
        """tokens · h_kv · (d + d_v) are stored; a token's query meets every column in every head."""
        numbers, gate = site.heads * (site.inp + site.out), self.tokens * site.heads if self.gated else 0
        stored, flops = self.tokens * numbers, 2 * self.tokens * site.queries * (site.inp + site.out)
        trained = numbers * (self.hidden + 1) if self.hidden else stored
        return Cost(trained=trained + gate, stored=stored + gate, flops=flops)

    def shared_cost(self) -> Cost:
        """The table and first matrix of each MLP, which are not stored when training is done."""
        each = self.width * (self.tokens + self.hidden) + self.hidden
        return Cost(trained=each * len(self.roles.split(",")) if self.hidden else 0)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """k, v → cat(P_k, k), cat(P_v, v); masks and biases let every query see the columns."""
        import torch

        from surgeon import columns

        added = factor = None
        if self.gated:
            added, factor = columns.gate(edit, edit.param("gate", (site.heads, self.tokens), ZEROS))
        k, v = self._table(edit, site, "k", site.inp), self._table(edit, site, "v", site.out)
        if factor is not None:
            v = edit.mul(v, edit.call(torch.ops.aten.unsqueeze.default, factor, -1))
        dropout, hidden = self.dropout, self._hidden
        columns.attach(edit, (k, v), dropout=dropout, hidden=hidden, biased=self.biased, added=added)

    def _table(self, edit: Edit, site: Site, name: str, size: int) -> fx.Node:
        """The columns `[h_kv, tokens, size]` of one attention."""
        import torch

        shape = (site.heads, self.tokens, size)
        if not self.hidden:
            return edit.param(name, shape, ZEROS if self._drawn() == ZEROS else NORMAL)
        bound = f"uniform:{self.hidden**-0.5}"
        features = edit.once(f"{site.role}_features", lambda trunk: self._features(trunk, site.role))
        last = ZEROS if self._drawn() == ZEROS else bound
        weight = edit.param(f"{name}_weight", (site.heads * size, self.hidden), last)
        bias = edit.param(f"{name}_bias", (site.heads * size,), last)
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
        from surgeon import biases, positions

        super().finish(graph, owner)
        biases.widen_trunk(graph, owner, self.tokens, every=self.biased)
        alone = "decoder_input_ids" not in graph.inputs
        if not self.gated and ("decoder" in self.roles or (alone and "encoder" in self.roles)):
            positions.shift(graph, owner, self.tokens)

    def initialise(self, graph: Graph, owner: str, seed: int, tokenizer: Any) -> None:
        """Keys and values of a text, or the MLP that makes them."""
        from surgeon.first_columns import FirstColumns, FirstFeatures, FirstWeight, TextColumns
        from surgeon.sites import sites

        if not self._drawn().startswith(TEXT):
            return
        read = TextColumns(self._drawn().removeprefix(TEXT), self.tokens, graph.copy(), owner, tokenizer)
        for site in sites(graph, ATTENTION):
            for word in ("k", "v"):
                columns, name = FirstColumns(read, f"{site.path}.{word}"), site.tensor(owner, word)
                if name in graph.inserted:
                    graph.inserted[name] = columns
                elif f"{name}_weight" in graph.inserted:
                    shared = {
                        part: graph.inserted[f"{owner}.{site.role}_{part}"] for part in ("table", "weight", "bias")
                    }
                    features, bias = FirstFeatures(**shared), graph.inserted[f"{name}_bias"]
                    graph.inserted[f"{name}_weight"] = FirstWeight(columns, features, bias)

    def columns(self, params: Mapping[str, torch.Tensor], site: Site) -> Columns:
        """The columns as they are, or as the MLP makes them."""
        from surgeon.columns import gate_of
        from surgeon.normal import Columns

        k, v = self._columns(params, site, "k"), self._columns(params, site, "v")
        if not self.gated:
            return Columns(k, v, windowed=self._hidden)
        bias, factor = gate_of(params["gate"], site)
        return Columns(k, v * factor, bias, self._hidden)

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
        """The columns as they are, behind a gate that is open as far as their bias says."""
        if not self.gated:
            return {"k": form.k, "v": form.v}
        bias = form.k.new_zeros(site.queries, self.tokens) if form.column_bias is None else form.column_bias
        return {"k": form.k, "v": form.v, "gate": bias.exp()[:: site.queries // site.heads].contiguous()}

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
        sites = "decoder" if both else cls.sites
        return cls(tokens=int(config["num_virtual_tokens"]), sites=sites, biased=True)
