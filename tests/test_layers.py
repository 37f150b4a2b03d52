"""Layers are shared exactly where they are equal, and sharing changes nothing but the time."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from benchmarks.zoo import families
from benchmarks.zoo.graphs import graph_of
from surgeon.capture import capture_config
from surgeon.layers import LayerTracer, Retrace
from surgeon.signature import LayerIndex, index_attributes, layer_lists, signature
from surgeon.split import split

# Kinds of layers: what the architecture says, not what the tracer found.
KINDS = {
    "llama": [4], "gemma2": [2, 2], "gemma3_text": [2, 2], "gemma3n_text": [1, 1, 1, 1], "llama4_text": [2, 2],
    "gpt_oss": [2, 2], "deepseek_v3": [1, 3], "t5": [1, 1, 1, 1], "bart": [2, 2], "bert": [2], "gpt2": [4],
    "mistral": [4], "qwen3_moe": [1, 3], "mixtral": [4], "falcon": [4], "bloom": [4], "deberta-v2": [2], "opt": [4],
}  # fmt: skip
BOTH_WAYS = ("llama", "gemma2", "llama4_text", "deepseek_v3", "t5", "bart", "bert")


@pytest.mark.parametrize("family", KINDS)
def test_there_are_as_many_graphs_as_kinds_of_layers(family: str) -> None:
    assert [len(paths) for _, paths in graph_of(family).groups()] == KINDS[family]


def text(graph: fx.Graph) -> list[str]:
    """Every node with names replaced by the order in which they appear."""
    order: dict[str, str] = {}
    lines = []
    for node in graph.nodes:
        target = "" if node.op == "placeholder" else str(node.target)
        given = re.sub(r"%?\b\w+\b", lambda m: order.get(m.group(), m.group()), f"{node.args} {node.kwargs}")
        order[node.name] = f"n{len(order)}"
        lines.append(f"{node.op} {target} {given}")
    return lines


@pytest.mark.parametrize("family", BOTH_WAYS)
def test_every_layer_traced_alone_is_the_shared_one(family: str) -> None:
    shared, alone = (
        graph_of(family),
        capture_config(families.tiny_config(family), families.task_of(family), share_layers=False),
    )
    assert len(alone.groups()) == len(alone.layers)
    assert list(alone.layers) == list(shared.layers)
    for path, layer in shared.layers.items():
        assert text(alone.layers[path]) == text(layer), path
    assert text(alone.trunk) == text(shared.trunk)
    assert (alone.tensors, alone.ties, alone.outputs) == (shared.tensors, shared.ties, shared.outputs)


class Block(nn.Module):
    """A layer that may depend on where it stands."""

    def __init__(self, index: int, rule: str = "") -> None:
        super().__init__()
        self.layer_idx, self.rule, self.inner = index, rule, nn.Linear(4, 4)

    def forward(self, x: Tensor, store: dict[int, Tensor] | None = None) -> Tensor:
        x = self.inner(x)
        if self.rule == "scale":
            return x / (self.layer_idx + 1)
        if self.rule == "parity" and self.layer_idx % 2:
            return x.relu()
        if store is not None:
            store[0] = x
        return x


class Model(nn.Module):
    def __init__(self, rule: str = "", count: int = 4) -> None:
        super().__init__()
        self.rule = rule
        self.layers = nn.ModuleList(Block(i, rule) for i in range(count))

    def forward(self, x: Tensor) -> Tensor:
        store: dict[int, Tensor] = {}
        outputs: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if self.rule == "store":
                x = layer(x, store=store)
            elif self.rule == "cast" and i == 1:
                x = layer(x.relu()[None])[0]
            elif self.rule == "in place" and i == 3:
                x = layer(x.add_(1))
            elif self.rule == "between" and i == 3:
                x = layer(x * 2)
            elif self.rule == "twice" and i == 3:
                x = layer(layer(x))
            else:
                x = layer(x)
            outputs.append(x)
        return x + outputs[1] * outputs[-2] if self.rule == "skip" else x


def traced(model: nn.Module) -> tuple[LayerTracer, fx.Graph]:
    """As capture does it: again and again until nothing was assumed that is not so."""
    private: set[str] = set()
    for _ in range(6):
        tracer = LayerTracer(model, share=True, private=private)
        try:
            with tracer, torch.no_grad():
                program = torch.export.export(model, (torch.randn(3, 4),), strict=False)
            again = [
                kind.shape for kind in tracer.kinds.values() if kind.followers and any(i.read for i in kind.indices)
            ]
            if not again:
                return tracer, program.module(check_guards=False).graph
            private.update(again)
        except Retrace:
            assert private
    raise AssertionError("never settled")


def followers(model: nn.Module) -> list[list[str]]:
    return [kind.followers for kind in traced(model)[0].kinds.values()]


def test_equal_layers_are_traced_once() -> None:
    model = Model()
    tracer, graph = traced(model)
    assert [kind.path for kind in tracer.kinds.values()] == ["layers.0"]
    cut = split(graph, {kind.path: kind.followers for kind in tracer.kinds.values()}, tracer.runs)
    assert list(cut.layers) == [f"layers.{i}" for i in range(4)]
    assert len({id(layer) for layer in cut.layers.values()}) == 1
    assert [node.target for node in cut.trunk.nodes if node.op == "call_module"] == list(cut.layers)


@pytest.mark.parametrize("rule", ["scale", "parity", "store"])
def test_layers_that_depend_on_their_place_are_not_shared(rule: str) -> None:
    assert followers(Model(rule)) == [[], [], [], []]


def test_a_layer_called_otherwise_is_a_kind_of_its_own() -> None:
    assert followers(Model("cast")) == [["layers.2", "layers.3"], []]


@pytest.mark.parametrize("rule", ["", "skip", "in place", "between", "twice", "cast"])
def test_what_happens_between_layers_is_kept(rule: str) -> None:
    model = Model(rule, 6)
    tracer, graph = traced(model)
    cut = split(graph, {kind.path: kind.followers for kind in tracer.kinds.values()}, tracer.runs)
    x = torch.randn(3, 4)
    modules = {path: fx.GraphModule(model.get_submodule(path), layer) for path, layer in cut.layers.items()}
    with torch.no_grad():
        expected = model(x.clone())
        found = fx.GraphModule({**modules, **dict(model.named_modules())} | modules, cut.trunk)(x)
    assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)


@pytest.mark.parametrize(("rule", "regular"), [("", True), ("skip", True), ("in place", False), ("between", False)])
def test_layers_that_follow_one_another_are_one_operator(rule: str, regular: bool) -> None:
    tracer, graph = traced(Model(rule, 6))
    assert len([n for n in graph.nodes if n.target is torch.ops.surgeon.layers.default]) == len(tracer.runs)
    assert sum(run.taken for run in tracer.runs) == 5
    assert [run.taken for run in tracer.runs] == ([5] if regular else [2, 1, 1, 1])


def test_the_model_is_left_as_it_was() -> None:
    model = Model()
    before = [list(model.layers), [dict(layer.__dict__) for layer in model.layers], model.layers[0].layer_idx]
    traced(model)
    assert before == [list(model.layers), [dict(layer.__dict__) for layer in model.layers], model.layers[0].layer_idx]
    assert type(model.layers[0].layer_idx) is int


def test_an_index_remembers_being_looked_at() -> None:
    looks: list[Any] = [
        lambda i: i + 1,
        lambda i: i == 3,
        lambda i: {i},
        str,
        int,
        lambda i: [0] * 9 and list(range(9))[i],
        bool,
    ]
    for look in looks:
        index = LayerIndex(3)
        assert not index.read
        look(index)
        assert index.read
    index = LayerIndex(3)
    assert isinstance(index, LayerIndex)
    assert index is not None
    assert not index.read


def test_an_index_is_what_counts_up() -> None:
    layers = nn.ModuleList(Block(i) for i in range(3))
    for layer in layers:
        layer.width = 4
    assert index_attributes(layers) == ["layer_idx"]
    assert index_attributes(nn.ModuleList([Block(0)])) == []


def test_shapes_attributes_and_classes_make_a_signature() -> None:
    def of(block: nn.Module) -> str:
        return signature(block, ["layer_idx"])

    other = Block(1)
    other.inner = nn.Linear(4, 4, bias=False)
    assert of(Block(0)) == of(Block(1))
    assert of(Block(0)) != of(Block(0, "scale"))
    assert of(Block(0)) != of(other)


def test_lists_of_layers_are_the_outermost_ones() -> None:
    model = nn.Sequential(nn.Module(), Model())
    model[1].layers[0].experts = nn.ModuleList(Block(i) for i in range(2))
    model[1].norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
    assert [path for path, _ in layer_lists(model)] == ["1.layers"]
