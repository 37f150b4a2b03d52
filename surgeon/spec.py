"""What may stand in a graph at each stage, as tables; checked after every pass."""

from __future__ import annotations

from torch import fx

from surgeon.errors import SurgeonError
from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, Graph, path_of, tag

_OPERATIONS = ("placeholder", "get_attr", "call_function", "call_module", "output")


def check(graph: Graph, owner: str = "") -> None:
    """Raise SurgeonError for a node that is not legal in an edited graph, naming its path and who touched it last.

    Legal are: inputs and outputs; reads of a tensor of the graph; aten, surgeon and Python operators; calls of a layer,
    in the trunk alone. Every node is defined before it is used and has metadata.
    """
    for part, prefixes in graph.parts():
        part.lint()
        for node in part.nodes:
            tensor = node.op == "get_attr"
            found = [
                (prefix, why)
                for prefix in (prefixes if tensor else prefixes[:1])
                if (why := _illegal(graph, node, prefix))
            ]
            if found:
                prefix, why = found[0]
                touched = tag(node).owner if tag(node) else owner  # type: ignore[union-attr]
                raise SurgeonError(
                    f"illegal node {node.name}: {why}",
                    f"{prefix}{path_of(node)}, last touched by {touched or 'capture'}",
                    "report this with the output of surgeon show",
                )


def _illegal(graph: Graph, node: fx.Node, prefix: str) -> str:
    if node.op not in _OPERATIONS:
        return f"{node.op} is not an operation of a graph"
    if node.op == "call_module" and (prefix or node.target not in graph.layers):
        return f"calls {node.target}, which is no layer"
    if node.op == "get_attr" and node.target not in (MODEL_DTYPE, MODEL_DEVICE):
        name = prefix + str(node.target)
        if graph.resolve(name) not in graph.tensors:
            return f"reads {name}, which the graph does not have"
    if node.op != "output" and "val" not in node.meta:
        return "has no metadata"
    return ""
