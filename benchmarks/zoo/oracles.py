"""What tests of several methods ask of a model: that it learns a batch, and that PEFT merges it to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.zoo.graphs import close, inputs_of
from surgeon.fold import fold, value_of
from surgeon.graph import Graph
from surgeon.model import SurgeonModel
from surgeon.module import load


def losses_on(model: SurgeonModel, ids: torch.Tensor, lr: float, steps: int) -> list[float]:
    """The loss before each of some steps of Adam on one batch."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss: Any = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return losses


@torch.no_grad()
def exported_again(graph: Graph) -> set[Any]:
    """The operators of the model of a graph as torch.export traces it, which computes the same at other sizes."""
    model, inputs = load(graph), tuple(inputs_of(graph))
    sizes = tuple({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for _ in inputs)
    program = torch.export.export(model, inputs, dynamic_shapes=(sizes,), strict=False)
    again = program.module(check_guards=False)
    for shape in ((2, 7), (3, 4)):
        given = inputs_of(graph, *shape)
        assert all(close(*pair) for pair in zip(again(*given), model(*given), strict=True))
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


@torch.no_grad()
def nudged(model: SurgeonModel, std: float) -> SurgeonModel:
    """The model as if it had been trained: what trains is moved, the same way each time."""
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def merged_pairs(model: Any, graph: Graph) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, PEFT's merged value and surgeon's, for every parameter; PEFT's model is merged and used up."""
    ours = fold(graph)
    for name, parameter in model.merge_and_unload().named_parameters():
        yield name, parameter.data, value_of(ours, ours.resolve(name))


def assert_merged_alike(model: Any, graph: Graph) -> None:
    """PEFT's merge and surgeon's have the same bits."""
    for name, theirs, ours in merged_pairs(model, graph):
        assert torch.equal(theirs, ours), name
