"""A layer as people draw it: one block per module, its reshapes left out, what passes inserted kept apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgeon.chains import chains, span
from surgeon.graph import path_of, tag
from surgeon.sites import aten

_PLUMBING = frozenset(
    """
    view reshape transpose permute contiguous expand unsqueeze squeeze slice getitem to type_as sym_size clone t detach
    alias select split split_with_sizes chunk flatten unflatten _to_copy dropout ones_like zeros_like size
    """.split()  # noqa: SIM905  one word each reads better
)
_MATRICES = (aten.linear.default, aten.addmm.default, aten.embedding.default)
_SIGNS = {"add": "+", "mul": "×"}


@dataclass
class Block:
    """One block of a drawing.

    Attributes:
        title: its name: the module's, or the operator's.
        detail: what it computes, or its shape.
        kind: "input", "output", "matrix", "attention", "module", "sign" (a small circle).
        owner: id of the pass that inserted it, "" for the base model's.
        reads: the blocks it reads.
    """

    title: str
    detail: str = ""
    kind: str = "module"
    owner: str = ""
    reads: list[Block] = field(default_factory=list)


def blocks(part: fx.Graph) -> list[Block]:
    """The blocks of a layer's graph, every one after those it reads."""
    nodes = [node for node in part.nodes if node.op != "get_attr"]
    grouped = _blocks(nodes, _groups(nodes))
    return grouped if grouped is not None else _blocks(nodes, {node: node for node in nodes}) or []


def _blocks(nodes: list[fx.Node], leader: dict[fx.Node, fx.Node]) -> list[Block] | None:
    """A block for each group of nodes; None if the groups read one another in a circle."""
    members: dict[fx.Node, list[fx.Node]] = {}
    drawn = _reading(nodes)
    for node in drawn:
        members.setdefault(leader[node], []).append(node)
    made = {first: _block(group) for first, group in members.items()}
    reads = {
        first: list(dict.fromkeys(leader[s] for n in group for s in drawn[n] if leader[s] is not first))
        for first, group in members.items()
    }
    ordered = _sorted(reads)
    if ordered is None:
        return None
    for first, sources in reads.items():
        made[first].reads = [made[source] for source in sources]
    return [made[first] for first in ordered]


def _sorted(reads: dict[fx.Node, list[fx.Node]]) -> list[fx.Node] | None:
    done: dict[fx.Node, None] = {}
    while len(done) < len(reads):
        ready = [node for node, sources in reads.items() if node not in done and all(s in done for s in sources)]
        if not ready:
            return None
        done.update(dict.fromkeys(ready))
    return list(done)


def _states(nodes: list[fx.Node]) -> set[fx.Node]:
    """The inputs that are hidden states, as wide as the first one; sizes, masks and rotary tables are not drawn."""
    inputs = [node for node in nodes if node.op == "placeholder"]
    width = _width(inputs[0]) if inputs else None
    first = {node for node in inputs[:1] if node.users}
    return first | {node for node in inputs if width is not None and _width(node) == width and tag(node) is None}


def _width(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    fits = isinstance(value, torch.Tensor) and value.dim() == 3 and isinstance(value.shape[-1], int)
    return int(value.shape[-1]) if fits else None


def _reading(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """The drawn nodes, each with the drawn nodes whose values it reads, through reshapes."""
    states = _states(nodes)
    through: dict[fx.Node, list[fx.Node]] = {}
    drawn: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        sources: dict[fx.Node, None] = {}
        for source in node.all_input_nodes:
            sources.update(dict.fromkeys([source] if source in drawn else through.get(source, [])))
        through[node] = list(sources)
        shown = node in states if node.op == "placeholder" else operator_name(node) not in _PLUMBING and bool(sources)
        if shown or node.op == "output":
            drawn[node] = through[node]
    return drawn


def operator_name(node: fx.Node) -> str:
    """`linear` for aten.linear.default."""
    target: Any = node.target
    name = (
        target._schema.name if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    )
    return str(name).rpartition(":")[2]


def _groups(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Each node's group: nodes of one module that read one another are one block, unless they stand for themselves."""
    leader = {node: node for node in nodes}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    for node, sources in _reading(nodes).items():
        for source in () if _stands_alone(node) else sources:
            if not _stands_alone(source) and path_of(source) == path_of(node):
                leader[find(node)] = find(source)
    for chain in chains(nodes[0].graph) if nodes else []:
        leader.update(dict.fromkeys(chain.calls, chain.calls[0]))
    return {node: find(node) for node in nodes}


def _stands_alone(node: fx.Node) -> bool:
    special = node.target in _MATRICES or operator_name(node) in ("attention", "expert_linear")
    return node.op != "call_function" or special or tag(node) is not None or path_of(node) == ""


def _block(group: list[fx.Node]) -> Block:
    node, mark = group[0], tag(group[0])
    owner = mark.owner if mark else ""
    if node.op == "call_module":
        return Block(span(str(member.target) for member in group), "layers" if len(group) > 1 else "layer")
    if node.op != "call_function":
        return Block("input" if node.op == "placeholder" else "output", kind=node.op.replace("placeholder", "input"))
    name, path = operator_name(node), path_of(node)
    if len(group) > 1:
        names = {operator_name(member) for member in group}
        rotary = {"neg", "cat"} <= names
        return Block("rotary" if rotary else path.rpartition(".")[2], "" if rotary else _function(names))
    if node.target in _MATRICES or name == "expert_linear":
        return _matrix(node, owner)
    if name == "attention":
        return Block("attention", _attention(node), "attention", owner)
    if name in _SIGNS:
        return _sign(node, name, owner)
    leaf = path.rpartition(".")[2]
    return Block(
        name if leaf in ("", "act_fn", name) else leaf, "" if leaf in ("", "act_fn", name) else name, owner=owner
    )


def _function(names: set[str]) -> str:
    if {"pow", "mean", "rsqrt"} <= names:
        return "RMS norm"
    return ", ".join(sorted(names - {"add", "mul"})[:3]) or ", ".join(sorted(names))


def _attention(node: fx.Node) -> str:
    heads = [node.args[i].meta["val"].shape[1] for i in (0, 1)]
    window = node.kwargs.get("window")
    return f"{heads[0]} heads, {heads[1]} K/V" + (f", window {window}" if window else "")


def _weight(node: Any) -> fx.Node | None:
    """The tensor behind an argument, through slices and transposes."""
    while isinstance(node, fx.Node) and node.op == "call_function" and operator_name(node) in _PLUMBING:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op in ("get_attr", "placeholder") else None


def _matrix(node: fx.Node, owner: str) -> Block:
    position = {aten.addmm.default: 2, aten.embedding.default: 0}.get(node.target, 1)
    weight = node.args[position]
    shape = list(weight.meta["val"].shape)[-2:]
    inp, out = shape if node.target in (aten.addmm.default, aten.embedding.default) else reversed(shape)
    title = path_of(node).rpartition(".")[2] or operator_name(node)
    if owner:
        stored = _weight(weight)
        label = str(stored.target).removeprefix(f"{owner}_") if stored is not None else title
        title = label.rpartition(".")[2]
    return Block(title, f"{inp:,} → {out:,}", "matrix", owner)


def _sign(node: fx.Node, name: str, owner: str) -> Block:
    other = node.args[1] if len(node.args) > 1 else None
    if isinstance(other, (int, float)):
        return Block(f"{_SIGNS[name]} {other:.4g}", kind="module", owner=owner)
    stored = _weight(other)
    if stored is not None and stored.op == "get_attr":
        return Block(f"⊙ {str(stored.target).rpartition('.')[2]}", owner=owner)
    return Block(_SIGNS[name], kind="sign", owner=owner)
