"""What tests of several methods ask of a model: that it learns a batch, and that PEFT merges it to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from surgeon.fold import fold, value_of
from surgeon.graph import Graph
from surgeon.model import SurgeonModel


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


def merged_pairs(model: Any, graph: Graph) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, PEFT's merged value and surgeon's, for every parameter; PEFT's model is merged and used up."""
    ours = fold(graph)
    for name, parameter in model.merge_and_unload().named_parameters():
        yield name, parameter.data, value_of(ours, ours.resolve(name))


def assert_merged_alike(model: Any, graph: Graph) -> None:
    """PEFT's merge and surgeon's have the same bits."""
    for name, theirs, ours in merged_pairs(model, graph):
        assert torch.equal(theirs, ours), name
