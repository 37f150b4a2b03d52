from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from benchmarks.zoo.graphs import graph_of
from surgeon import run, spec
from surgeon.errors import SurgeonError
from surgeon.graph import Graph, copied
from surgeon.passes import make


def edited(change: Callable[[Graph, fx.Graph], Any]) -> Graph:
    graph = run.apply(graph_of("llama"), make("lora", rank=2))
    part, _ = copied(graph.layers["model.layers.0"])
    for path in graph.layers:
        graph.layers[path] = part
    change(graph, part)
    return graph


def node_of(part: fx.Graph, op: str) -> fx.Node:
    return next(node for node in part.nodes if node.op == op)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral", "t5"])
def test_captured_graphs_are_legal(family: str) -> None:
    spec.check(graph_of(family))


def test_a_tensor_the_graph_does_not_have() -> None:
    def change(graph: Graph, part: fx.Graph) -> None:
        node_of(part, "get_attr").target = "self_attn.no_such.weight"

    with pytest.raises(SurgeonError, match=r"reads model.layers.0.self_attn.no_such.weight") as caught:
        spec.check(edited(change))
    assert "capture" in caught.value.where
    assert "report" in caught.value.hint


def test_a_tensor_missing_from_one_layer_of_many() -> None:
    graph = edited(lambda graph, part: graph.tensors.pop("model.layers.3.self_attn.q_proj.lora.a"))
    with pytest.raises(SurgeonError, match=r"model.layers.3.self_attn.q_proj.lora.a"):
        spec.check(graph)


def test_the_pass_that_touched_a_node_last_is_named() -> None:
    def change(graph: Graph, part: fx.Graph) -> None:
        inserted = next(node for node in part.nodes if node.op == "call_function" and node.meta.get("surgeon"))
        del inserted.meta["val"]

    with pytest.raises(SurgeonError, match="has no metadata") as caught:
        spec.check(edited(change))
    assert "model.layers.0.self_attn.q_proj, last touched by lora" in caught.value.where


def test_layers_call_no_layers() -> None:
    def change(graph: Graph, part: fx.Graph) -> None:
        with part.inserting_before(next(iter(reversed(part.nodes)))):
            part.call_module("model.layers.1", ())

    with pytest.raises(SurgeonError, match=r"calls model\.layers\.1"):
        spec.check(edited(change))


def test_other_operations_are_illegal() -> None:
    def change(graph: Graph, part: fx.Graph) -> None:
        first = node_of(part, "call_function")
        with part.inserting_after(first):
            made = part.call_method("contiguous", (first,))
        made.meta["val"] = torch.empty(1)

    with pytest.raises(SurgeonError, match="call_method is not an operation"):
        spec.check(edited(change))


def test_a_node_before_what_it_reads() -> None:
    def change(graph: Graph, part: fx.Graph) -> None:
        last = next(node for node in reversed(part.nodes) if node.op == "call_function")
        node_of(part, "call_function").prepend(last)

    with pytest.raises(RuntimeError, match="used before it has been"):
        spec.check(edited(change))
