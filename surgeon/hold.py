"""Putting codes in the place of a linear's weight, and the weight back again.

The node of the linear stays where it is: passes before and after work on it as on any other. The weight stays among the
graph's tensors, marked as held, so that it is known and not loaded; its value is what the codes decode to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from surgeon.edit import Edit
from surgeon.errors import SurgeonError, UnsupportedError
from surgeon.graph import Graph, Holding, Tag, TensorSpec
from surgeon.quantised import HELD, Held

aten = torch.ops.aten
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One tensor that stands for a weight: its name, shape and dtype; None for the dtype of the arithmetic."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass
class Codes:
    """The codes of weights, made from their values when they are first asked for; the last weight's are kept.

    `make` takes the full name of a weight. An error of it that names no place gets the weight's name.
    """

    make: Callable[[str], Parts]
    last: tuple[str, Parts] = field(default=("", {}), repr=False)

    def __call__(self, weight: str, part: str) -> torch.Tensor:
        """One tensor of a weight."""
        if self.last[0] != weight:
            self.last = ("", {})
            try:
                self.last = (weight, self.make(weight))
            except SurgeonError as error:
                raise type(error)(error.what, error.where or weight, error.hint) from error
        return self.last[1][part]


def hold(
    edit: Edit,
    function: Any,
    parts: Sequence[Part],
    codes: Callable[[str, str], torch.Tensor],
    decode: Callable[[Parts], torch.Tensor],
    **options: Any,
) -> None:
    """The site's linear becomes `function(x, bias, *parts, **options)` in every layer that shares the graph.

    Args:
        edit: of the site.
        function: the operator.
        parts: the tensors that stand for the weight, in the operator's order.
        codes: (full name of a weight, name of a part) → value.
        decode: the parts by name → the weight as it is stored, for those that need its value.
        options: keywords of the operator.

    Raises:
        UnsupportedError: something else in the layer reads the weight.
    """
    node, site = edit.node, edit.site
    turned = node.target is aten.addmm.default
    x, weight, bias = (*node.args[1:], node.args[0]) if turned else (*node.args[:2], edit.bias)
    prefix = f"{site.layer}." if site.layer else ""
    relative = {one.name: site.tensor(edit.owner, one.name).removeprefix(prefix) for one in parts}
    if len(weight.users) > 1 or any(n.target == weight.target for n in edit.part.nodes if n is not weight):
        readers = sorted({str(mark.owner) for n in weight.users if (mark := n.meta.get("surgeon"))})
        hint = f"apply {edit.owner} before {', '.join(readers)}" if readers else "leave the module out with --exclude"
        raise UnsupportedError("something else reads the weight that is to be quantised", site.path, hint)
    for path in edit.paths:
        own = f"{path}." if path else ""
        full, names = edit.graph.resolve(own + str(weight.target)), []
        for one in parts:
            names.append(own + relative[one.name])
            edit.graph.tensors[names[-1]] = TensorSpec(one.shape, one.dtype, owner=edit.owner, parameter=False)
            edit.graph.inserted[names[-1]] = functools.partial(codes, full, one.name)
        holding = Holding(edit.owner, dict(zip(relative, names, strict=True)), decode)
        edit.graph.tensors[full] = replace(edit.graph.tensors[full], held=holding)
    node.meta[HELD] = Held(edit.owner, node.target, str(weight.target), dict(weight.meta))
    made = [_attribute(edit, relative[one.name], one) for one in parts]
    node.target, node.args, node.kwargs = function, (x, bias, *made), options
    edit.part.erase_node(weight)


def release(node: fx.Node) -> None:
    """The linear as it was before `hold`."""
    held: Held = node.meta.pop(HELD)
    with node.graph.inserting_before(node):
        weight = node.graph.get_attr(held.target)
    weight.meta = dict(held.meta)
    x, bias = node.args[:2]
    node.target, node.kwargs = held.function, {}
    if held.function is aten.addmm.default:
        node.args = (bias, x, weight)
    else:
        node.args = (x, weight) if bias is None else (x, weight, bias)


def is_held(graph: Graph, name: str) -> bool:
    """Whether a tensor of the base is held in codes."""
    return name in graph.tensors and graph.tensors[name].held is not None


def holders(graph: Graph) -> set[str]:
    """The ids of the passes that hold weights in codes."""
    return {spec.held.owner for spec in graph.tensors.values() if spec.held is not None}


def held_value(graph: Graph, name: str) -> torch.Tensor:
    """What the codes of a held weight decode to, in fp32 (fp64 for codes of fp64)."""
    holding = graph.tensors[name].held
    assert holding is not None
    return holding.decode({part: graph.inserted[full]() for part, full in holding.parts.items()})


def _attribute(edit: Edit, relative: str, one: Part) -> fx.Node:
    with edit.part.inserting_before(edit.node):
        node = edit.part.create_node("get_attr", relative)
    with edit.shapes_only():
        value = torch.empty(one.shape, dtype=one.dtype or torch.float32, device="meta")
    node.meta.update(val=value, path=edit.node.meta.get("path", ""), surgeon=Tag(edit.owner, edit.node.name))
    return node
