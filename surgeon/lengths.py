"""Where a captured decoder depends on how many tokens it is given, and how to make it depend on how many there are.

A graph is captured with one length t: queries, keys, masks and positions all have it. With a cache there are t new
tokens after `past` old ones: masks and biases are for the total, positions start at `past`, and whatever else mixes
tokens (a recurrence, a convolution, an attention that is no node) would need state that is no key or value.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic

from surgeon import ops
from surgeon.edit import Edit
from surgeon.graph import Graph, path_of, tag
from surgeon.wiring import inputs_of, output_of

aten = torch.ops.aten
assert ops  # registers the attention operator
ATTENTION_OP = torch.ops.surgeon.attention.default
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
_MASK = ("input_ids", "attention_mask")
_SCANS = ("conv", "cumsum", "cumprod", "flip", "roll", "scan", "while_loop", "unfold", "lstm", "gru")


def token_ids(graph: Graph) -> fx.Node:
    """The input with the decoder's token ids `[b, t]`, for multiple choice `[b, choices, t]`."""
    inputs = {str(node.target): node for node in inputs_of(graph.trunk)}
    return inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"]


def length_of(graph: Graph) -> str:
    """The symbol of t."""
    return symbol(token_ids(graph).meta["val"].shape[-1])


def symbol(size: Any) -> str:
    """A size as text: the expression of a symbolic one."""
    return str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


def is_length(value: object, length: str) -> bool:
    """Whether an argument is a node that stands for the length itself."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(found, torch.SymInt) and symbol(found) == length


def axes(node: fx.Node, length: str) -> list[int]:
    """The axes of a node's tensor that are t long."""
    value = node.meta.get("val")
    sizes_of = value.shape if isinstance(value, torch.Tensor) else ()
    return [axis for axis, size in enumerate(sizes_of) if symbol(size) == length]


def ancestors(roots: Iterable[object]) -> list[fx.Node]:
    """The tensors that the roots are computed from, and the roots, in order; sizes and layer calls are not followed."""
    found: set[fx.Node] = set()
    queue = [root for root in roots if isinstance(root, fx.Node)]
    while queue:
        node = queue.pop()
        if node not in found and not isinstance(node.meta.get("val"), torch.SymInt):
            found.add(node)
            queue.extend(node.all_input_nodes if node.op != "call_module" else [])
    return sorted(found)


def attentions(part: fx.Graph) -> list[fx.Node]:
    """The attention nodes of a graph."""
    return [node for node in part.nodes if node.target is ATTENTION_OP]


def masks_of(part: fx.Graph, *, cross: bool = True) -> list[fx.Node]:
    """The key masks and biases of the attention nodes of a graph, with or without those over an encoder's states."""
    nodes = [node for node in attentions(part) if cross or node.kwargs.get("role") != "cross"]
    return [arg for node in nodes for arg in node.args[3:5] if isinstance(arg, fx.Node)]


def past_symbol(graph: Graph) -> torch.SymInt:
    """The symbolic number of old tokens, one for the whole graph."""
    for node, name in zip(inputs_of(graph.trunk), graph.inputs, strict=True):
        if name.startswith("past_key_values.") and ".encoder." not in name:
            found: torch.SymInt = node.meta["val"].shape[2]
            return found
    environment = token_ids(graph).meta["val"].fake_mode.shape_env
    source = ConstantSource("past_length")
    made = environment.create_symbol(3, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size: torch.SymInt = environment.create_symintnode(made, hint=3, source=source)
    return size


def sizes(edit: Edit) -> tuple[fx.Node, fx.Node]:
    """The number of old tokens and of all, in the graph that is being edited."""
    trunk = Edit.of_trunk(edit.graph, edit.owner)
    known = {node.meta["size"]: node for node in trunk.part.nodes if "size" in node.meta}
    if not known:
        caches = zip(inputs_of(trunk.part), edit.graph.inputs, strict=True)
        past = next(n for n, name in caches if name.startswith("past_key_values.") and ".encoder." not in name)
        trunk.write_after(inputs_of(trunk.part)[-1])
        known["past"] = trunk.call(aten.sym_size.int, past, 2)
        known["new"] = trunk.call(aten.sym_size.int, token_ids(edit.graph), 1)
        known["total"] = trunk.call(operator.add, known["past"], known["new"])
        for word, node in known.items():
            node.meta["size"] = word
    if edit.part is trunk.part:
        return known["past"], known["total"]
    past, total = (edit.hand(f"{w}_length", dict.fromkeys(edit.paths, known[w])) for w in ("past", "total"))
    return past, total


def comes_from_layer(node: fx.Node) -> bool:
    """Whether a value of the trunk was computed in a layer."""
    return any(source.op == "call_module" for source in ancestors([node]))


def extended(edit: Edit, root: fx.Node, length: str, *, rows: bool) -> fx.Node:
    """A mask or bias that was computed for t tokens, computed for all of them.

    Args:
        edit: writes the nodes, after `root`.
        root: the mask `[b, t]` or the bias `[.., t, t]`.
        length: the symbol of t.
        rows: keep the last t rows of a bias alone, those of the new tokens.
    """
    copies: dict[fx.Node, fx.Node] = {}
    chain = ancestors([root])
    edit.write_after(root)
    with _lengthened(edit, chain, length):
        for node in chain:
            total = {n: _resized(edit, n, length) for n in node.all_input_nodes if is_sized(n, length)}
            if total or any(source in copies for source in node.all_input_nodes):
                copies[node] = edit.copy(node, {**copies, **total})
    result = copies.get(root, root)
    if rows and symbol(root.meta["val"].shape[-2]) == length:
        past, total = sizes(edit)
        result = edit.call(aten.slice.Tensor, result, -2, past, 2**63 - 1)
    return result


def grows(node: fx.Node, length: str) -> bool:
    """Whether any axis of a node's tensor depends on t."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(_mentions(size, length) for size in value.shape)


def _mentions(size: Any, length: str) -> bool:
    return isinstance(size, torch.SymInt) and length in {str(symbol) for symbol in size.node.expr.free_symbols}


def is_sized(node: fx.Node, length: str) -> bool:
    """Whether a node is a number that depends on t."""
    return _mentions(node.meta.get("val"), length)


def _resized(edit: Edit, number: fx.Node, length: str) -> fx.Node:
    """A number computed from t, computed from the number of all tokens."""
    if is_length(number, length):
        return sizes(edit)[1]
    return edit.copy(number, {n: _resized(edit, n, length) for n in number.all_input_nodes if is_sized(n, length)})


@contextlib.contextmanager
def _lengthened(edit: Edit, chain: list[fx.Node], length: str) -> Iterator[None]:
    """The shapes of a mask's chain when its inputs are for all tokens, inside the block."""
    before = {node: node.meta.get("val") for node in chain}
    changed = {node for node in chain if node.op == "placeholder" and symbol(node.meta["val"].shape[-1]) == length}
    for node in changed:
        shape = (*before[node].shape[:-1], sizes(edit)[1].meta["val"])
        with before[node].fake_mode:
            node.meta["val"] = torch.empty(shape, dtype=before[node].dtype, device="meta")
    _revalue(chain, changed)
    try:
        yield
    finally:
        for node, value in before.items():
            node.meta["val"] = value


def lengthen_input(graph: Graph) -> None:
    """Declare that the key mask among the inputs is for all tokens, and the shapes that follow from it."""
    new = token_ids(graph).meta["val"]
    mask = next((n for n in inputs_of(graph.trunk) if n.target == str(token_ids(graph).target).replace(*_MASK)), None)
    if mask is None:
        return
    shape, dtype = (new.shape[0], new.shape[1] + past_symbol(graph)), mask.meta["val"].dtype
    with new.fake_mode:
        mask.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    given = _revalue(graph.trunk.nodes, {mask})
    for call in [node for node in graph.trunk.nodes if node.op == "call_module"]:
        layer = graph.layers[str(call.target)]
        changed = {inner: value for inner, value in fed(layer, call) if value in given}
        for inner, outer in changed.items():
            inner.meta["val"] = outer.meta["val"]
        _revalue(layer.nodes, set(changed))


def _revalue(nodes: Iterable[fx.Node], changed: set[fx.Node]) -> set[fx.Node]:
    """Recompute the shapes of everything up to the attentions that reads a changed node; returns all that changed."""
    for node in nodes:
        reads = node.op == "call_function" and node.target is not ATTENTION_OP
        if reads and any(source in changed for source in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
            with contextlib.suppress(RuntimeError):  # shapes that do not fit are found by `surgeon.dry_run`
                node.meta["val"] = node.target(*args, **kwargs)
                changed.add(node)
    return changed


def live(part: fx.Graph) -> list[fx.Node]:
    """The nodes that the output needs; what passes have replaced stays in a graph, to be had back."""
    needed = {output_of(part)}
    for node in reversed(part.nodes):
        if node in needed or (node.op == "call_function" and node.is_impure()):
            needed.update((node, *node.all_input_nodes))
    return [node for node in part.nodes if node in needed]


def positions(part: fx.Graph, length: str) -> list[fx.Node]:
    """The `arange(t)` that number the new tokens: all but those that masks and biases are computed from."""
    hidden = set(ancestors(masks_of(part)))
    return [node for node in live(part) if node.target in _ARANGES and node not in hidden and axes(node, length) == [0]]


def mixing(graph: Graph) -> str:
    """The first place outside the attention nodes where one token's value depends on another's, or "".

    Found are scans and convolutions along the tokens, tensors with two axes of their length, and lengths that are not a
    plain multiple of it (shifted, padded or cut into chunks). Counting along the tokens is one of them. What passes
    inserted is left out.
    """
    length = length_of(graph)
    for part, prefixes in graph.parts():
        hidden = set(ancestors([*masks_of(part), *_trunk_masks(graph, part)]))
        for node in live(part):
            if node not in hidden and tag(node) is None and _mixes(node, length):
                return f"{prefixes[0]}{path_of(node)} ({node.target})"
    return ""


def _trunk_masks(graph: Graph, part: fx.Graph) -> list[fx.Node]:
    """The trunk's values that its layers use as masks and biases."""
    if part is not graph.trunk:
        return []
    found = []
    for call in part.nodes:
        if call.op == "call_module":
            layer = graph.layers[str(call.target)]
            found += [given for inner, given in fed(layer, call) if inner in set(ancestors(masks_of(layer)))]
    return found


def fed(layer: fx.Graph, call: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """A layer's inputs with what a call of it gives them."""
    return list(zip(inputs_of(layer), call.args, strict=True))


def _mixes(node: fx.Node, length: str) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or node.target is ATTENTION_OP:
        return False
    odd = any(length in symbol(size) and not _multiple(size) for size in value.shape)
    return odd or len(axes(node, length)) > 1 or (bool(axes(node, length)) and _scans(node, length))


def _scans(node: fx.Node, length: str) -> bool:
    """A scan along the tokens; counts along another axis (experts, features) are harmless."""
    name = str(node.target)
    if not any(word in name for word in _SCANS):
        return False
    axis = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], int) else None
    rank = node.meta["val"].dim()
    return axis is None or axis % rank in axes(node, length)


def _multiple(size: Any) -> bool:
    """Whether a size is a product of symbols and a constant."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
    return all(factor.is_Symbol or factor.is_Integer for factor in sympy.Mul.make_args(expression))
