"""What a method does around a training step, in the open: no forward pass hides it.

A pass gives its hooks by `Adapter.hooks`; the trainer calls them and saves their state with the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from surgeon.graph import Graph


class Hook:
    """Override what the method needs. `step` counts the optimiser steps done before this one."""

    def check(self, total: int) -> None:
        """Before anything is written: raise UsageError where the method has no place in a run of `total` steps."""

    def reshape(self, model: nn.Module, state: dict[str, Any]) -> None:
        """Before a checkpoint is read: give the model the shapes it had when `state_dict` gave `state`."""

    def before_step(self, model: nn.Module, step: int, total: int) -> None:
        """Before the first batch of a step."""

    def extra_loss(self, model: nn.Module) -> Tensor | None:
        """A scalar that is minimised beside the loss, counted once per step; what is logged is the loss alone."""
        return None

    def before_update(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Before the optimiser's step; the gradients are whole and clipped."""

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """After the optimiser's step; the gradients are still there."""

    def finish(self, model: nn.Module) -> None:
        """After the last step of a run, also of one that fails."""

    def report(self, out: Path) -> None:
        """After the run: files to write beside its loss curve."""

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
