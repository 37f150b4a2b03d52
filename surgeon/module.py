"""A `Graph` as a `torch.nn.Module` with the Hugging Face model's parameter names and call.

Layers are modules of their own, the unit of activation checkpointing. A graph too large for memory runs through
`surgeon.stream` instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from surgeon import ops
from surgeon.compile import code
from surgeon.errors import UsageError
from surgeon.graph import Graph, TensorSpec

assert ops  # registers the operators


class Scope(nn.Module):
    """A module that only holds tensors and other modules.

    `_mixed` says that what passes inserted has another dtype than the base (see `surgeon.mixed`).
    """

    _mixed = False

    def forward(self, *args: Any) -> Any:
        """Raises: a scope has no function of its own."""
        raise UsageError("this part of the model has no function of its own", type(self).__name__)

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype that "the dtype of the model" means here."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def model_device(self) -> torch.device:
        """The device that "the device of the model" means here."""
        return next(self.parameters()).device


class Layer(Scope):
    """One layer: its tensors, and the function it shares with its equals."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph
        self.checkpointing = False

    def forward(self, *args: Any) -> Any:
        """Run the layer; with checkpointing its activations are recomputed in the backward pass."""
        function = code(self.graph).choose(training=self.training, mixed=self._mixed, device=self.model_device.type)
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, self, *args, use_reentrant=False)
        return function(self, *args)


class GraphModule(Scope):
    """The trunk and its layers as one module; `forward` takes the graph's inputs and returns its outputs."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def run(self, trunk: fx.Graph, *inputs: Any) -> tuple[Any, ...]:
        """Run a trunk (the graph's own, or a variant such as the one without its head) on this module's tensors."""
        function = code(trunk).choose(training=self.training, mixed=self._mixed, device=self.model_device.type)
        result: tuple[Any, ...] = function(self, *inputs)
        return result

    def forward(self, *inputs: Any) -> Any:
        """The graph's outputs as a tuple, from its inputs in order."""
        return self.run(self.graph.trunk, *inputs)

    def layer_modules(self) -> Iterator[Layer]:
        """The layers that are loaded."""
        return (module for module in self.modules() if isinstance(module, Layer))


def load(
    graph: Graph,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    into: GraphModule | None = None,
) -> GraphModule:
    """Build the module of a graph and read its tensors.

    Args:
        graph: a graph with values.
        dtype: the dtype of the model; None keeps each tensor's own.
        device: where the tensors go.
        into: a module to fill instead of a new one.

    Raises:
        UsageError: a tensor has no value.
    """
    where = torch.device(device)
    root = into if into is not None else GraphModule(graph)
    _frame(root, graph)
    for name, spec in graph.resident().items():
        place(root, name, read_tensor(graph, name, dtype, where), spec)
    for alias, name in graph.ties.items():
        owner, leaf = _parent(root, alias)
        owner.register_parameter(leaf, root.get_parameter(name))
    note_dtypes(root)
    return root.eval()


def note_dtypes(root: GraphModule) -> None:
    """Tell every layer whether adapters and base differ in dtype; to be called when either has changed."""
    inserted = {name for name, spec in root.graph.tensors.items() if spec.owner}
    dtypes = {name: p.dtype for name, p in root.named_parameters() if p.is_floating_point()}
    adapters = {dtype for name, dtype in dtypes.items() if name in inserted}
    mixed = bool(adapters) and not adapters <= {dtype for name, dtype in dtypes.items() if name not in inserted}
    for scope in root.modules():
        if isinstance(scope, Scope):
            scope._mixed = mixed


def rebind(graph: Graph, loaded: nn.Module) -> GraphModule:
    """The module of a graph on the parameters and buffers of another module, which has at least its tensors.

    Nothing is copied: a step of training changes both. Buffers are shared until either module is moved.

    Raises:
        UsageError: the other module lacks a tensor.
    """
    held = {**dict(loaded.named_parameters(remove_duplicate=False)), **dict(loaded.named_buffers())}
    root = GraphModule(graph)
    _frame(root, graph)
    for name in (*graph.resident(), *graph.ties):
        if name not in held:
            raise UsageError(f"the loaded model has no tensor {name}", type(loaded).__name__, "load the model anew")
        owner, leaf = _parent(root, name)
        tensor = held[name]
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=graph.tensors[name].persistent)
    note_dtypes(root)
    return root.eval()


def read_tensor(graph: Graph, name: str, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """The value of a tensor of the graph, in its own fixed dtype or the wanted one.

    Raises:
        UsageError: it has none.
    """
    spec = graph.tensors[name]
    if name in graph.inserted:
        tensor = graph.inserted[name]()
    elif name in graph.values:
        tensor = graph.values[name]
    else:
        raise UsageError(f"no value for {name}", graph.source or type(graph.config).__name__, "load a checkpoint")
    wanted = spec.dtype or (dtype if tensor.is_floating_point() and not spec.owner else None)
    # A tensor of the base that trained itself may be held in more bits than the base has.
    own = graph.values[name].dtype if name in graph.inserted and name in graph.values else tensor.dtype
    return tensor.to(device=device, dtype=wanted or own)


def place(root: nn.Module, name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
    """Register a tensor under its dotted name, making the modules on the way."""
    owner, leaf = _parent(root, name)
    if spec.parameter:
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=spec.trainable))
    else:
        owner.register_buffer(leaf, tensor, persistent=spec.persistent)


def _parent(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, Scope())
        root = root._modules[part]  # type: ignore[assignment]
    return root, leaf


def _frame(root: nn.Module, graph: Graph) -> None:
    """The modules, in the order of the tensors: a tied one counts under the name it is stored by, as in its model."""
    for name in (*graph.resident(), *(f"{path}." for path in graph.layers)):
        module, path = root, ""
        for part in name.split(".")[:-1]:
            path = f"{path}.{part}" if path else part
            if part not in module._modules:
                module.add_module(part, Layer(graph.layers[path]) if path in graph.layers else Scope())
            module = module._modules[part]  # type: ignore[assignment]
