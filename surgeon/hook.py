"""What a method does around a training step, in the open: no forward pass hides it.

A pass gives its hooks by `Adapter.hooks`; the trainer calls them and saves their state with the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from surgeon.graph import Graph


class Hook:
    """Override what the method needs. `step` counts the optimiser steps done before this one."""

    def before_step(self, model: nn.Module, step: int, total: int) -> None:
        """Before the first batch of a step."""

    def extra_loss(self, model: nn.Module) -> Tensor | float:
        """A scalar that is added to the loss, once per step."""
        return 0.0

    def before_update(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Before the optimiser's step; the gradients are whole and clipped."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """After the optimiser's step; the gradients are still there."""

    def finish(self, model: nn.Module) -> None:
        """After the last step of a run, also of one that fails."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values to save with the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


def hooks_of(graph: Graph, seed: int) -> list[Hook]:
    """The hooks of the methods applied to a graph, in order; `seed` is the run's."""
    from surgeon.passes.base import Adapter
    from surgeon.run import owners

    found = ((owner, step) for owner, step in owners(graph.applied).items() if isinstance(step, Adapter))
    return [hook for owner, step in found for hook in step.hooks(graph, owner, seed)]
