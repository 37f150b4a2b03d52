"""S-LoRA: many requests with many adapters in one batch, over one pool of memory (Sheng et al. 2023, §4-§5)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from surgeon.errors import UnsupportedError, UsageError
from surgeon.passes.base import ATTENTION, CONV1D, LINEAR, Adapter, Pass, Skip

if TYPE_CHECKING:
    import torch
    from torch import fx

    from surgeon.edit import Edit
    from surgeon.graph import Graph
    from surgeon.sites import Site

_HINT = "generate with it, or merge its adapters and serve it with another engine"


@dataclass(frozen=True)
class SLora(Pass):
    """The model for a server: a batch is one row of tokens, `[1, t]`, of requests one after another.

    Attentions read keys and values from pages of `slora.pool` and write those of new tokens there. At every linear the
    output becomes y' = s ⊙ (y + o ⊙ (scale · ((u ⊙ x) Aᵀ ⊙ l) B)) + bias with what the adapter of each token has of
    these, rows of the pool too (see `surgeon.serve`). Embedded tokens may be rows of the pool (prompts). Logits are
    those of the tokens in `slora.keep`.

    Options:
        targets: the linears that adapters may change, see `surgeon.select`.
        exclude: linears that are left out.
        page: numbers per page of the pool; 0 for as many as the model's layers suggest.
        block: tokens per page.
        each: attend every token by itself, so that its result does not depend on the rest of the batch.
    """

    name: ClassVar[str] = "slora"
    keeps: ClassVar[str] = "close"
    stacks: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (ATTENTION, LINEAR, CONV1D)
    targets: str = "*"
    exclude: str = ""
    page: int = 0
    block: int = 0
    each: bool = False

    def __post_init__(self) -> None:
        if self.page < 0 or self.block < 0:
            raise UsageError(f"{self.name}: page and block are {self.page}, {self.block}", "--page", "0 or more")

    def requires(self, graph: Graph) -> None:
        """Raise for a model that is no decoder of text, or whose tokens meet anywhere but in attention nodes."""
        from surgeon import lengths
        from surgeon.run import require_node

        model = graph.config.model_type
        if graph.task != "causal-lm":
            what = f"{self.name} needs a decoder; this model was captured for {graph.task}"
            raise UnsupportedError(what, model, "serve a causal language model")
        require_node(graph, ATTENTION, self.name)
        place = lengths.mixing(graph)
        if place:
            what = f"{self.name}: {model} carries state from token to token that is no key or value"
            raise UnsupportedError(what, place, _HINT)
        applied = [step.name for step in graph.applied if isinstance(step, Adapter) or step.name == "kv_cache"]
        if applied:
            what = f"{self.name} serves the bare base, and this graph has {', '.join(applied)}"
            raise UsageError(what, graph.source, "serve the base, and load the adapters by name")

    def match(self, graph: Graph) -> list[Site | Skip]:
        """Attentions, and the targeted linears that see every token once."""
        from surgeon.sites import sites
        from surgeon.targets import targeted

        wanted = targeted(graph, sites(graph, LINEAR, CONV1D), self.targets, self.exclude)
        linears = [
            site if _per_token(graph, site) else Skip(site.path, "it does not see every token") for site in wanted
        ]
        return [*sites(graph, ATTENTION), *linears]

    def prepare(self, graph: Graph, chosen: list[Site]) -> SLora:
        """With the sizes of pages."""
        from surgeon.serve.layout import layout_of

        linears = tuple(site for site in chosen if site.kind != ATTENTION)
        found = layout_of(graph, linears, _hidden(graph), self.block)
        return dataclasses.replace(self, page=max(self.page, found.page), block=found.block)

    def rewrite(self, edit: Edit, site: Site) -> None:
        """An attention over pages, or a bypass out of the pool."""
        if site.kind == ATTENTION:
            self._attention(edit, site)
        else:
            self._linear(edit, site)

    def _attention(self, edit: Edit, site: Site) -> None:
        import torch

        from surgeon.sites import sites

        node, options = edit.node, dict(edit.node.kwargs)
        if edit.has(4) or not options.get("causal"):
            what = f"{self.name}: this attention has a mask or bias of its own"
            raise UnsupportedError(what, site.path, _HINT)
        numbers = {(s.layer, s.node): i for i, s in enumerate(sites(edit.graph, ATTENTION))}
        names = {path: f"slora.{{}}.{numbers[path, node.name]}" for path in edit.paths}
        spans = edit.common_input("slora.spans", torch.int64, (2, 3))
        table = _per_layer(edit, names, "table", spans, (2, 2))
        prefix = _per_layer(edit, names, "prefix", spans, (2, 5))
        kept = {k: v for k, v in options.items() if k in ("scale", "window", "chunk", "softcap")}
        y = edit.call(
            torch.ops.surgeon.paged_attention.default,
            *(edit.argument(i) for i in range(3)), edit.argument(5) if edit.has(5) else None, self._pool(edit),
            spans, table, prefix, **kept, page=self.page, block=self.block, each=self.each,
        )  # fmt: skip
        edit.replace(y)

    def _linear(self, edit: Edit, site: Site) -> None:
        import torch

        names = {path: f"slora.{{}}.{_moved(site, path)}" for path in edit.paths}
        rows = edit.common_input("slora.rows", torch.int64, (4,))
        pool = self._pool(edit)
        last = site.layer == "" and _selects(edit.graph) and edit.node in _tail(edit.graph)
        owners = edit.common_input("slora.last_owners" if last else "slora.owners", torch.int64, (4,))
        table = _per_layer(edit, names, "adapters", rows, (2, 10))
        scales = _per_layer(edit, names, "scales", pool, (2,))
        given = (pool, rows, table, scales, owners)
        edit.replace(
            edit.call(torch.ops.surgeon.pooled_bypass.default, edit.y, edit.x, edit.bias, *given, each=self.each)
        )
        edit.feed(edit.call(torch.ops.surgeon.pooled_input.default, edit.x, *given, each=self.each))

    def _pool(self, edit: Edit) -> fx.Node:
        import torch

        return edit.common_input("slora.pool", torch.float32, (2 * self.page,))

    def finish(self, graph: Graph, owner: str) -> None:
        """Rows of prompts among the embedded tokens, positions that are counted in the graph, and the last tokens."""
        import torch

        from surgeon import virtual
        from surgeon.edit import Edit

        site = virtual.token_embedding(graph, "input_ids")
        if site is not None:
            node = next(node for node in graph.trunk.nodes if node.name == site.node)
            edit = Edit.of_trunk(graph, owner, virtual.returned(graph.trunk, node))
            index, rows = (edit.common_input(f"slora.prompt_{word}", torch.int64, (2,)) for word in ("index", "rows"))
            edit.replace(edit.call(torch.ops.surgeon.pooled_rows.default, edit.y, self._pool(edit), index, rows))
        _number(graph, owner)
        if _selects(graph):
            _select(graph, owner)


def _hidden(graph: Graph) -> int:
    from surgeon import virtual

    site = virtual.token_embedding(graph, "input_ids")
    return site.out if site is not None else 0


def _per_layer(edit: Edit, names: dict[str, str], label: str, like: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    full = {path: name.format(label) for path, name in names.items()}
    return edit.model_input(full, f"{edit.node.name}_{label}", like, shape)


def _moved(site: Site, layer: str) -> str:
    """The path of the same site in another layer."""
    return layer + site.path.removeprefix(site.layer) if site.layer else site.path


def _per_token(graph: Graph, site: Site) -> bool:
    """Whether a linear's input has a row for every token of the batch."""
    from surgeon import lengths
    from surgeon.sites import argument_of, input_position

    part = graph.layers[site.layer] if site.layer else graph.trunk
    node = next(node for node in part.nodes if node.name == site.node)
    shape: Any = argument_of(node, input_position(node)).meta["val"].shape
    ids: Any = lengths.token_ids(graph).meta["val"].shape
    rows, wanted = _product(shape[:-1]), _product(ids)
    return lengths.symbol(rows) == lengths.symbol(wanted)


def _product(sizes: Any) -> Any:
    import math

    return math.prod(sizes)


def _tail(graph: Graph) -> list[fx.Node]:
    """The trunk after its last layer."""
    import operator

    nodes = list(graph.trunk.nodes)
    calls = [position for position, node in enumerate(nodes) if node.op == "call_module"]
    rest = nodes[calls[-1] + 1 :] if calls else []
    return [node for node in rest if node.target is not operator.getitem and node.op == "call_function"]


def _selects(graph: Graph) -> bool:
    """Whether what follows the layers can be computed for some of the tokens: nothing there asks how many there are."""
    import torch

    tail = _tail(graph)
    sized = any(isinstance(n.meta.get("val"), torch.SymInt) for node in tail for n in (node, *node.all_input_nodes))
    return bool(tail) and not sized


def _select(graph: Graph, owner: str) -> None:
    """What leaves the last layer, for the tokens whose logits are wanted."""
    import torch

    from surgeon import lengths
    from surgeon.edit import Edit

    length, tail = lengths.length_of(graph), _tail(graph)
    sources = {source for node in tail for source in node.all_input_nodes} - {*tail}
    crossing = [n for n in sources if n.op in ("call_function", "call_module") and lengths.axes(n, length)]
    for value in sorted(crossing):
        edit = Edit.of_trunk(graph, owner, value)
        keep = edit.common_input("slora.keep", torch.int64, (2,))
        others = [user for user in edit.y.users if user not in tail]
        axis = lengths.axes(value, length)[0]
        edit.replace(edit.call(torch.ops.aten.index_select.default, edit.y, axis, keep), keep=others)


def _number(graph: Graph, owner: str) -> None:
    """Tokens that the graph counts itself have the positions they are given."""
    import torch

    from surgeon import lengths
    from surgeon.edit import Edit
    from surgeon.graph import copied
    from surgeon.sites import Site

    length = lengths.length_of(graph)
    places: list[tuple[Edit, torch.dtype]] = []
    for shared, paths in [(graph.trunk, [""]), *graph.groups()]:
        if not lengths.positions(shared, length):
            continue
        part = shared if paths == [""] else copied(shared)[0]
        for node in lengths.positions(part, length):
            edit = Edit(graph, part, paths, owner, Site("", "", paths[0], node.name), 0)
            places.append((edit, node.meta["val"].dtype))
        graph.layers.update({path: part for path in paths if path})
    for edit, dtype in places:
        given = edit.common_input("slora.positions", torch.int64, (4,))
        edit.replace(edit.call(torch.ops.aten.to.dtype, given, dtype))
