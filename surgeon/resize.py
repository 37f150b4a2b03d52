"""Parameters that change their shape while they train: in the module, in the optimiser, and in the graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from surgeon import run
from surgeon.graph import Graph
from surgeon.module import GraphModule
from surgeon.passes.base import Pass
from surgeon.replaced import Held
from surgeon.strip import without


@torch.no_grad()
def select(model: nn.Module, optimizer: torch.optim.Optimizer, kept: Mapping[str, tuple[int, Tensor]]) -> None:
    """Replace parameters by some of their entries, `name → (axis, index)`, gradients and optimiser state with them.

    They are new objects: what autograd still holds of the step before is of the old shape.
    """
    swapped: dict[Tensor, tuple[nn.Parameter, int, Tensor]] = {}
    for name, (axis, index) in kept.items():
        old = model.get_parameter(name)
        new = _register(model, name, old.index_select(axis, index), old)
        if old.grad is not None:
            new.grad = old.grad.index_select(axis, index)
        swapped[old] = new, axis, index
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    for group in optimizer.param_groups:
        group["params"] = [swapped[p][0] if p in swapped else p for p in group["params"]]
    for before, (new, axis, index) in swapped.items():
        state = optimizer.state.pop(before, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == before.shape:
                state[key] = value.index_select(axis, index)
        if state:
            optimizer.state[new] = state


@torch.no_grad()
def reshape(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give parameters other shapes; those that change hold zeros, to be filled from a checkpoint."""
    for name, shape in shapes.items():
        old = model.get_parameter(name)
        if tuple(old.shape) != shape:
            _register(model, name, old.new_zeros(shape), old)


def _register(model: nn.Module, name: str, tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    made = nn.Parameter(tensor, requires_grad=like.requires_grad)
    setattr(model.get_submodule(path), leaf, made)
    return made


def redo(graph: Graph, changed: Mapping[str, Pass]) -> Graph:
    """The graph with its passes applied anew, those in `changed` (by their ids) with other options.

    Values stay; what has another shape than before has its first value.
    """
    steps = run.owners(graph.applied)
    base = without(graph, set(steps))
    result = run.apply(base, *(changed.get(owner, step) for owner, step in steps.items()))
    for name, spec in result.tensors.items():
        if name in graph.inserted and spec.shape == graph.tensors[name].shape:
            result.inserted[name] = graph.inserted[name]
    return result


def install(model: GraphModule, graph: Graph) -> None:
    """Let a module run another graph, whose tensors it has."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for name in graph.trainable():
        graph.inserted[name] = Held(held[name].detach())
    model.graph = graph
    for path, part in graph.layers.items():
        layer = model.get_submodule(path)
        layer.graph = part
