"""A graph as readable text, and the difference of two graphs.

Nodes are named `%<module path>/<operator>.<n>`, counted per module and operator, so inserting nodes renames nothing
elsewhere and a diff shows what a pass did and no more. Layers that share a graph are printed once, and layers that call
one another in turn are one line of the trunk: the text does not grow with depth.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from surgeon.chains import Chain, chains, span
from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, Graph, path_of

Names = dict[fx.Node, str]


def render(graph: Graph) -> str:
    """The whole graph: the trunk, then each kind of layer with the layers that are of it."""
    blocks = [f"trunk{_signature(graph.trunk)}:", *_lines(graph.trunk)]
    for part, paths in graph.groups():
        blocks += ["", f"layer {span(paths)}{_signature(part)}:", *_lines(part)]
    return "\n".join(blocks) + "\n"


def digest(graph: Graph) -> str:
    """sha256 of the text: a graph that comes out different later is a different graph."""
    return hashlib.sha256(render(graph).encode()).hexdigest()


def diff(before: Graph, after: Graph, context: int = 1) -> str:
    """What changed, as a unified diff of the texts; "" if nothing did."""
    lines = difflib.unified_diff(
        render(before).splitlines(), render(after).splitlines(), "before", "after", lineterm="", n=context
    )
    return "\n".join(lines)


def _signature(part: fx.Graph) -> str:
    names = _names(part, [])
    return "(" + ", ".join(names[node] for node in part.nodes if node.op == "placeholder") + ")"


def _lines(part: fx.Graph) -> Iterator[str]:
    found = chains(part)
    names = _names(part, found)
    first = {chain.calls[0]: chain for chain in found}
    inside = {node for chain in found for node in chain.nodes}
    for node in part.nodes:
        if node in first:
            yield from _chain_lines(first[node], names)
        elif node.op not in ("placeholder", "get_attr") and node not in inside:
            yield _line(node, names)


def _line(node: fx.Node, names: Names) -> str:
    if node.op == "output":
        return f"  return {_value(node.args[0], names)}"
    values = [_value(arg, names) for arg in node.args]
    values += [f"{key}={_value(value, names)}" for key, value in node.kwargs.items()]
    target = f"call {node.target}" if node.op == "call_module" else _operator(node)
    return f"  {names[node]} = {target}({', '.join(values)}){_shape(node)}"


def _chain_lines(chain: Chain, names: Names) -> Iterator[str]:
    """Layers called in turn: `↻` marks what each hands to the next, with the value that the first one gets.

    Layers that are called with other values beside it have a line each kind.
    """
    results = [names[node] for node in chain.results]
    shape = _shape(chain.results[0]) if len(chain.results) == 1 else ""
    head = f"  {', '.join(results)} = call {span(chain.paths)} in turn"
    groups = chain.groups()
    if len(groups) == 1:
        yield f"{head}({_handed(chain, groups[0][0], names, start=True)}){shape}"
        return
    yield f"{head}{shape}:"
    for position, (call, paths) in enumerate(groups):
        yield f"    {span(paths)}({_handed(chain, call, names, start=position == 0)})"


def _handed(chain: Chain, call: fx.Node, names: Names, *, start: bool) -> str:
    words = []
    for position, arg in enumerate(call.args):
        source = chain.carried.get(position)
        if source is None:
            words.append(_value(arg, names))
            continue
        mark = f"↻{source or ''}"
        words.append(f"{mark} {_value(arg, names)}" if start else mark)
    return ", ".join(words)


def _names(part: fx.Graph, found: list[Chain]) -> Names:
    """Readable names that do not depend on nodes elsewhere."""
    stems = {node: f"{chain.stem}/out" for chain in found for node in chain.results}
    hidden = {node for chain in found for node in chain.nodes} - set(stems)
    counts: dict[str, int] = {}
    names: Names = {}
    for node in part.nodes:
        if node in hidden:
            continue
        if node.op == "get_attr":
            target = str(node.target)
            names[node] = {MODEL_DTYPE: "model.dtype", MODEL_DEVICE: "model.device"}.get(target, target)
            continue
        stem = stems.get(node) or _stem(node)
        number = counts.get(stem, 0)
        counts[stem] = number + 1
        names[node] = f"%{stem}" + (f".{number}" if number or stem == "in" else "")
    return names


def _stem(node: fx.Node) -> str:
    if node.op == "placeholder":
        return str(node.target) if not _is_traced_name(str(node.target)) else "in"
    return f"{path_of(node)}/{_operator(node).rpartition('.')[2]}" if path_of(node) else _operator(node)


def _is_traced_name(name: str) -> bool:
    """Names that tracing numbered; they differ from one capture to the next."""
    return name.rpartition("_")[2].isdigit() or name.startswith(("getitem", "to_dtype", "sym_size"))


def _operator(node: fx.Node) -> str:
    target: Any = node.target
    if node.op == "call_module":
        return "layer"
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.rpartition(':')[2]}"
    return str(getattr(target, "__name__", target))


def _value(value: Any, names: Names) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item, names) for item in value) + "]"
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, int) and value >= 2**62:
        return "end"
    return str(value)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    return "  [" + ", ".join(str(size) if isinstance(size, int) else "·" for size in value.shape) + "]"
