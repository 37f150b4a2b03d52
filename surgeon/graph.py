"""The graph every pass edits: a trunk that calls one sub-graph per layer, and the tensors it reads.

Equal layers share one `torch.fx.Graph` object and differ only in their parameters. A `Graph` holds structure; weights
stay where they are (see `surgeon.weights`) until something asks for their values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from surgeon.passes.base import Pass

MODEL_DTYPE = "model_dtype"
MODEL_DEVICE = "model_device"
INPUT = "input"  # node.meta key: the name of an input that is no Python identifier


@dataclass(frozen=True)
class Holding:
    """The codes that stand for a weight (see `surgeon.hold`).

    Attributes:
        owner: id of the pass that quantised it.
        parts: name of a part → full name of its tensor.
        decode: the parts by name → the weight as it is stored.
    """

    owner: str
    parts: Mapping[str, str] = field(hash=False)
    decode: Callable[[dict[str, torch.Tensor]], torch.Tensor] = field(compare=False)


@dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer of the graph.

    Attributes:
        shape: its shape.
        dtype: a fixed dtype, or None for the dtype of the model (fp32, bf16 or fp16, chosen when it is loaded).
        trainable: whether training changes it.
        owner: "" for the base model, else the id of the pass that inserted it.
        persistent: False for buffers that are computed, not stored (rotary frequencies).
        parameter: False for buffers.
        held: what stands for it, of a weight that is held in codes and not loaded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    trainable: bool = False
    owner: str = ""
    persistent: bool = True
    parameter: bool = True
    held: Holding | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Tag:
    """Who inserted a node.

    Attributes:
        owner: the pass's id.
        site: name of the node of the site it was inserted at.
        output: whether it stands for what that node returns.
        input: whether it stands for what that node reads.
        outer: whether it stays around what passes write at the site later (rows before the tokens of an embedding).
    """

    owner: str
    site: str
    output: bool = False
    input: bool = False
    outer: bool = False


@dataclass
class Graph:
    """A captured model, and what passes made of it.

    Attributes:
        config: the Hugging Face config.
        task: one of `surgeon.tasks`, "causal-lm" for example.
        trunk: the top-level graph; a `call_module` node whose target is a layer's path calls that layer.
        layers: layer path → its graph, shared between equal layers.
        tensors: full name → what it is. Names are those of the Hugging Face model.
        values: full name → tensor, read when needed.
        ties: alias → the tensor it is (`lm_head.weight` → `model.embed_tokens.weight`).
        outputs: names of the trunk's outputs, in order.
        applied: the passes applied so far, in order.
        notes: what capture found worth telling: attentions that are no node, noise that was switched off.
        source: folder the model was read from.
        labels: names of the classes, where they were chosen and are not the config's own.
        context: length in tokens that positions were scaled to, 0 for the config's own.
        fresh: modules whose values are new, because the checkpoint has none: the head of another task.
    """

    config: PretrainedConfig
    task: str
    trunk: fx.Graph
    layers: dict[str, fx.Graph]
    tensors: dict[str, TensorSpec]
    values: Mapping[str, torch.Tensor]
    ties: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("logits",)
    applied: tuple[Pass, ...] = ()
    notes: tuple[str, ...] = ()
    source: str = ""
    inserted: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    context: int = 0
    fresh: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the trunk's inputs, in order."""
        return tuple(str(node.meta.get(INPUT, node.target)) for node in self.trunk.nodes if node.op == "placeholder")

    def groups(self) -> list[tuple[fx.Graph, list[str]]]:
        """Every distinct layer graph with the paths of the layers that share it, in the order of the layers."""
        shared: dict[int, tuple[fx.Graph, list[str]]] = {}
        for path, graph in self.layers.items():
            shared.setdefault(id(graph), (graph, []))[1].append(path)
        return list(shared.values())

    def parts(self) -> Iterator[tuple[fx.Graph, list[str]]]:
        """The trunk (with the one prefix "") and then every distinct layer graph with its prefixes."""
        yield self.trunk, [""]
        for graph, paths in self.groups():
            yield graph, [f"{path}." for path in paths]

    def nodes(self) -> Iterator[tuple[str, fx.Node]]:
        """Every node once per layer it stands for, with that layer's prefix."""
        for graph, prefixes in self.parts():
            for prefix in prefixes:
                for node in graph.nodes:
                    yield prefix, node

    def resolve(self, name: str) -> str:
        """The name under which a possibly tied tensor is stored."""
        return self.ties.get(name, name)

    def copy(self) -> Graph:
        """A graph with the same nodes and tensors whose dictionaries can be changed without touching this one."""
        return dataclasses.replace(
            self,
            layers=dict(self.layers),
            tensors=dict(self.tensors),
            ties=dict(self.ties),
            inserted=dict(self.inserted),
        )

    def rewritable(self) -> Graph:
        """A copy whose nodes can be changed too; layers that share a graph go on sharing theirs."""
        result = self.copy()
        result.trunk = copied(self.trunk)[0]
        for part, paths in self.groups():
            result.layers.update(dict.fromkeys(paths, copied(part)[0]))
        return result

    def text(self) -> str:
        """The graph, readable: see `surgeon.text`."""
        from surgeon import text

        return text.render(self)

    def resident(self) -> dict[str, TensorSpec]:
        """What is in memory when the graph runs: everything but the weights that codes stand for."""
        return {name: spec for name, spec in self.tensors.items() if spec.held is None}

    def trainable(self) -> dict[str, TensorSpec]:
        """What training changes."""
        return {name: spec for name, spec in self.tensors.items() if spec.trainable}


def copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of one fx graph with its metadata, and the map from old nodes to new ones."""
    fresh = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = fresh.graph_copy(graph, mapping)
    old = next(node for node in reversed(graph.nodes) if node.op == "output")
    new = fresh.output(output)
    new.meta = dict(old.meta)
    mapping[old] = new
    for before, after in mapping.items():
        after.meta = dict(before.meta)
    return fresh, mapping


def structure(graph: fx.Graph) -> str:
    """What a graph computes, written down: equal for two graphs that are copies of one another."""
    number = {node: str(position) for position, node in enumerate(graph.nodes)}
    written = [
        str((node.op, str(node.target), fx.node.map_arg((node.args, dict(node.kwargs)), number.__getitem__)))
        for node in graph.nodes
    ]
    return "\n".join(written)


def sweep(graph: fx.Graph) -> None:
    """Erase nodes nothing reads; in-place operators and inputs stay."""
    graph.eliminate_dead_code(is_impure_node=_keeps)


def _keeps(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    return node.op == "call_function" and node.is_impure()


def tag(node: fx.Node) -> Tag | None:
    """Who inserted this node, None for the base model's own."""
    found: Any = node.meta.get("surgeon")
    return found if isinstance(found, Tag) else None


def path_of(node: fx.Node) -> str:
    """The module path of a node relative to its layer (or the whole model, for the trunk)."""
    return str(node.meta.get("path", ""))


def val(node: fx.Node) -> torch.Tensor:
    """The fake tensor a node stands for."""
    value: Any = node.meta["val"]
    return value
