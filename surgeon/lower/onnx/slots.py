"""Adapters as inputs of the model, in normal form: one graph, any adapter, swapped while it runs.

Per targeted linear y = ((u ⊙ x) Wᵀ + b + ((u ⊙ x) A) B) ⊙ s + d, with the inputs

    <path>.lora_A [in, r]   <path>.lora_B [r, out]   <path>.in_scale u [in | 1]   <path>.out_scale s [out | 1]
    <path>.out_shift d [out | 1], where the layer has a bias: b' - s ⊙ b for an adapter whose bias is b'

and per attention `prefix.<i>.key`, `prefix.<i>.value` [1, h_kv, p, d], before the past; mask and positions follow, and
`present` is without them. Encoder-decoders have `prefix.<i>.encoder.key`, `.decoder.` and `.cross.`, three lengths p.
r and p differ from adapter to adapter and may be 0: that is the base.

Stacked, every slot of a linear has an axis of n adapters before, and `adapter_ids` [b] says which one a row has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from surgeon import biases, columns, heads, lengths, positions, wiring
from surgeon.edit import Edit
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph, val
from surgeon.lower.onnx.adapter_file import IDS, LEAVES, empty, is_slot
from surgeon.passes.base import ATTENTION, CONV1D, LINEAR, Pass, Skip
from surgeon.sites import Site, argument_of, input_position, sites
from surgeon.targets import targeted

aten = torch.ops.aten
A, B, IN, OUT, SHIFT = LEAVES
KEY, VALUE = "key", "value"
DECODER, ENCODER, CROSS = "decoder", "encoder", "cross"
LENGTHS = {DECODER: "prefix_length", ENCODER: "encoder_prefix_length", CROSS: "cross_prefix_length"}
"""How many columns attentions of a role have."""
_HINT = "--targets names others; --adapters merge needs no slots"
COUNT = "adapters"
_TRACED, _STACK = 6, 3
_HINTS = {DECODER: 13, ENCODER: 17, CROSS: 19}
"""The rank and the number of adapters in the metadata of a graph; exports are without them."""


@dataclass(frozen=True)
class Slots(Pass):
    """Inputs for an adapter at linears and attentions.

    Options:
        targets: the linears, see `surgeon.select`.
        exclude: linears that are left out.
        prefix: whether attentions have a prefix.
        stacked: whether rows of a batch have adapters of their own.
    """

    name: ClassVar[str] = "slots"
    keeps: ClassVar[str] = "close"
    stacks: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (ATTENTION, LINEAR, CONV1D)
    targets: str = "all-linear"
    exclude: str = ""
    prefix: bool = True
    stacked: bool = False

    def match(self, graph: Graph) -> list[Site | Skip]:
        """The targeted linears that compute in the model's dtype, and the attentions if they have a prefix.

        The head of a classifier is always among them: its adapters train it.
        """
        every, head = sites(graph, LINEAR, CONV1D), set(heads.head_modules(graph))
        chosen = {site.path for site in targeted(graph, every, self.targets, self.exclude)}
        linears = [site for site in every if site.path in chosen or site.path.partition(".")[0] in head]
        reasons = {site.path: self._unfit(graph, site) for site in linears}
        found: list[Site | Skip] = [Skip(s.path, reasons[s.path]) if reasons[s.path] else s for s in linears]
        if all(reasons.values()):
            why = "; ".join(dict.fromkeys(reasons.values())) or f"no linear is named by {self.targets}"
            raise UnsupportedError(f"the model has no linear for slots: {why}", graph.config.model_type, _HINT)
        return [*found, *(sites(graph, ATTENTION) if self.prefix else [])]

    def rewrite(self, edit: Edit, site: Site) -> None:
        """Around a linear, or before the keys and values of an attention."""
        if site.kind == ATTENTION:
            self._attention(edit, site)
        else:
            self._linear(edit, site)

    def _unfit(self, graph: Graph, site: Site) -> str:
        """Why a linear has no slots, or ""."""
        part = graph.layers[site.layer] if site.layer else graph.trunk
        node = next(node for node in part.nodes if node.name == site.node)
        x = val(argument_of(node, input_position(node)))
        if x.dtype != torch.bfloat16:
            return "it computes in fp32"
        return "its rows are no texts, and stacked adapters are one per text" if self.stacked and x.dim() != 3 else ""

    def _linear(self, edit: Edit, site: Site) -> None:
        def slot(leaf: str, *shape: int) -> fx.Node:
            names = {path: f"{path}{site.path.removeprefix(site.layer)}.{leaf}" for path in edit.paths}
            if not self.stacked:
                return edit.model_input(names, f"{edit.node.name}_{leaf}", edit.x, shape)
            made = edit.model_input(names, f"{edit.node.name}_{leaf}", edit.x, (_STACK, *shape))
            ids = edit.common_input(IDS, torch.int64, (val(edit.x).shape[0],))
            row = edit.call(aten.index_select.default, made, 0, ids)
            return row if len(shape) == 2 else edit.call(aten.unsqueeze.default, row, 1)

        low = edit.call(aten.matmul.default, edit.x, slot(A, site.inp, _TRACED))
        y = edit.add(edit.y, edit.call(aten.matmul.default, low, slot(B, _TRACED, site.out)))
        y = edit.mul(y, slot(OUT, site.out))
        edit.replace(edit.add(y, slot(SHIFT, site.out)) if site.bias else y)
        edit.feed(edit.mul(edit.x, slot(IN, site.inp)))

    def _attention(self, edit: Edit, site: Site) -> None:
        known = places(edit.graph)

        def slot(word: str, size: int) -> fx.Node:
            names = {path: f"prefix.{known[path, site.node]}.{word}" for path in edit.paths}
            label = f"prefix_{lengths.attentions(edit.part).index(edit.node)}_{word}"
            return edit.model_input(names, label, edit.argument(1), (1, site.heads, _length(edit.graph, site), size))

        tables = slot(KEY, site.inp), slot(VALUE, site.out)
        edit.write_after(wiring.inputs_of(edit.part)[-1])  # a layer's own biases are computed before its attention
        count = edit.call(aten.sym_size.int, tables[0], 2)
        edit.write_after(edit.y)
        biased = not (edit.has(4) and biases.sees_text(edit.argument(4)))
        columns.attach(edit, tables, dropout=0, hidden=True, biased=biased, added=None, count=count)

    def finish(self, graph: Graph, owner: str) -> None:
        """Tokens are numbered from the prefix on; an encoder's keep their numbers where there is a decoder."""
        if not self.prefix:
            return
        layers: dict[str, set[str]] = {}
        for site in sites(graph, ATTENTION):
            layers.setdefault(site.role, set()).add(site.layer)
        for role in [role for role in layers if role != CROSS]:
            count = _count(Edit.of_trunk(graph, owner), role)
            biases.widen_trunk(graph, owner, count, every=True, layers=layers[role])
        positions.shift(graph, owner, lambda edit: _count(edit, DECODER if DECODER in layers else ENCODER))


def places(graph: Graph) -> dict[tuple[str, str], str]:
    """(layer, node) of every attention → what its prefix is called: a number, and its role if some have others."""
    found: dict[tuple[str, str], str] = {}
    counts: dict[str, int] = {}
    attentions = sites(graph, ATTENTION)
    plain = {site.role for site in attentions} == {DECODER}
    for site in attentions:
        role = "" if plain else f".{site.role}"
        found[site.layer, site.node] = f"{counts.setdefault(role, 0)}{role}"
        counts[role] += 1
    return found


def _inputs(graph: Graph) -> dict[str, fx.Node]:
    return dict(zip(graph.inputs, wiring.inputs_of(graph.trunk), strict=True))


def _role(name: str) -> str:
    """Of the attention that a prefix is for."""
    word = name.split(".")[2]
    return word if word in LENGTHS else DECODER


def _first(graph: Graph, role: str) -> fx.Node | None:
    """The first prefix of a role."""
    return next((n for name, n in _inputs(graph).items() if name.startswith("prefix.") and _role(name) == role), None)


def _length(graph: Graph, site: Site) -> torch.SymInt:
    """The symbolic number of columns, one for all attentions of a role."""
    known = _first(graph, site.role)
    if known is not None:
        found: torch.SymInt = known.meta["val"].shape[2]
        return found
    environment = lengths.token_ids(graph).meta["val"].fake_mode.shape_env
    source, hint = ConstantSource(LENGTHS[site.role]), _HINTS[site.role]
    made = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size: torch.SymInt = environment.create_symintnode(made, hint=hint, source=source)
    return size


def _count(edit: Edit, role: str) -> fx.Node:
    """The number of columns, in the graph that is being edited."""
    trunk, label = Edit.of_trunk(edit.graph, edit.owner), LENGTHS[role]
    known = next((node for node in trunk.part.nodes if node.meta.get("columns") == label), None)
    if known is None:
        trunk.write_after(wiring.inputs_of(trunk.part)[-1])
        known = trunk.call(aten.sym_size.int, _first(edit.graph, role), 2)
        known.meta["columns"] = label
    return known if edit.part is trunk.part else edit.hand(label, dict.fromkeys(edit.paths, known))


def named(graph: Graph) -> list[str]:
    """The slots among a graph's inputs."""
    return [name for name in graph.inputs if is_slot(name)]


def shape_of(name: str, value: torch.Tensor) -> tuple[int | str, ...]:
    """The shape of a slot; what an adapter chooses has a name, of its own wherever adapters may differ in it."""
    if name == IDS:
        return ("batch_size",)
    path, _, leaf = name.rpartition(".")
    if leaf not in LEAVES:
        return (1, int(value.shape[1]), LENGTHS[_role(name)], int(value.shape[3]))
    sizes: tuple[int | str, ...] = (f"{name}.size",)
    if leaf in (A, B):
        sizes = (int(value.shape[-2]), f"{path}.rank") if leaf == A else (f"{path}.rank", int(value.shape[-1]))
    return sizes if value.dim() == len(sizes) else (COUNT, *sizes)


def sized(size: int | str, sizes: Mapping[str, int]) -> int:
    """A size of a slot in a run on shapes alone; a factor is traced as one number."""
    if isinstance(size, int):
        return size
    known = dict.fromkeys(LENGTHS.values(), sizes["prefix"])
    known |= {LENGTHS[CROSS]: sizes["cross"], COUNT: sizes["adapters"]}
    return known.get(size, sizes["rank"] if size.endswith(".rank") else 1)


def make_optional(model: ir.Model) -> None:
    """Give the slots of a model the base's values, which an adapter overrides and callers may leave out."""
    for value in model.graph.inputs:
        name, kind = str(value.name), value.dtype
        if name != IDS and is_slot(name) and kind is not None and value.shape is not None:
            shape = [size if isinstance(size, int) else str(size) for size in value.shape]
            value.const_value = ir.tensor(empty(name, shape, kind.numpy()), name=name)
            model.graph.register_initializer(value)
