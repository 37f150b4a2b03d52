"""A graph as readable text, and the difference of two graphs.

Nodes are named `%<module path>/<operator>.<n>`, counted per module and operator, so inserting nodes renames nothing
elsewhere and a diff shows what a pass did and no more. Layers that share a graph are printed once.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, Graph, path_of


def render(graph: Graph) -> str:
    """The whole graph: the trunk, then each kind of layer with the layers that are of it."""
    blocks = [f"trunk{_signature(graph.trunk)}:", *_lines(graph.trunk, graph)]
    for part, paths in graph.groups():
        blocks += ["", f"layer {_span(paths)}{_signature(part)}:", *_lines(part, graph)]
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


def _span(paths: list[str]) -> str:
    if len(paths) <= 3:
        return ", ".join(paths)
    return f"{paths[0]}, {paths[1]}, … {paths[-1]} ({len(paths)} layers)"


def _signature(part: fx.Graph) -> str:
    names = _names(part)
    return "(" + ", ".join(names[node] for node in part.nodes if node.op == "placeholder") + ")"


def _lines(part: fx.Graph, graph: Graph) -> Iterator[str]:
    names = _names(part)
    for node in part.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            yield f"  return {_value(node.args[0], names)}"
            continue
        values = [_value(arg, names) for arg in node.args]
        values += [f"{key}={_value(value, names)}" for key, value in node.kwargs.items()]
        target = f"call {node.target}" if node.op == "call_module" else _operator(node)
        yield f"  {names[node]} = {target}({', '.join(values)}){_shape(node)}"


def _names(part: fx.Graph) -> dict[fx.Node, str]:
    """Readable names that do not depend on nodes elsewhere."""
    counts: dict[str, int] = {}
    names: dict[fx.Node, str] = {}
    for node in part.nodes:
        if node.op == "get_attr":
            target = str(node.target)
            names[node] = {MODEL_DTYPE: "model.dtype", MODEL_DEVICE: "model.device"}.get(target, target)
            continue
        if node.op == "placeholder":
            stem = str(node.target) if not _is_traced_name(str(node.target)) else "in"
        else:
            stem = f"{path_of(node)}/{_operator(node).rpartition('.')[2]}" if path_of(node) else _operator(node)
        number = counts.get(stem, 0)
        counts[stem] = number + 1
        names[node] = f"%{stem}" + (f".{number}" if number or stem == "in" else "")
    return names


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


def _value(value: Any, names: dict[fx.Node, str]) -> str:
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
