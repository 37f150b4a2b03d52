"""What a trace bakes in is taken out, and what it computes stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from surgeon.cleanup import TRACE_DTYPE, clean
from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, copied

aten = torch.ops.aten


class Owner(nn.Module):
    """Runs a graph with the dtype and device of a model."""

    def __init__(self, graph: fx.Graph, dtype: torch.dtype, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        setattr(self, MODEL_DTYPE, dtype)
        setattr(self, MODEL_DEVICE, torch.device("cpu"))
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.run = fx.GraphModule(self, graph)


def cleaned(function: Callable[..., Any], shape: tuple[int, ...], weight: tuple[int, ...] | None = None) -> fx.Graph:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if weight is not None:
                self.weight = nn.Parameter(torch.empty(weight, dtype=TRACE_DTYPE, device="meta"), requires_grad=False)

        def forward(self, input_ids: Tensor) -> Any:
            return function(*([self.weight] if weight is not None else []), input_ids)

    inputs = (torch.empty(shape, dtype=TRACE_DTYPE, device="meta"),)
    dynamic = {"input_ids": {0: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        module = torch.export.export(Model(), inputs, dynamic_shapes=dynamic, strict=False).module(check_guards=False)
    graph, _ = copied(module.graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta.setdefault("val", torch.empty(weight or shape, dtype=TRACE_DTYPE, device="meta"))
    clean(graph)
    graph.lint()
    return graph


def targets(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def run(graph: fx.Graph, *inputs: Tensor, dtype: torch.dtype = torch.float32, **tensors: Tensor) -> Any:
    return Owner(graph, dtype, tensors).run(*inputs)[0]


def leaves(graph: fx.Graph) -> list[Any]:
    return torch.utils._pytree.tree_leaves([(node.args, node.kwargs) for node in graph.nodes])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_fp32_island_returns_to_the_dtype_it_came_from(dtype: torch.dtype) -> None:
    def norm(x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    graph, x = cleaned(norm, (3, 4)), torch.randn(5, 4, dtype=dtype)
    assert torch.equal(run(graph, x, dtype=torch.float32), norm(x))
    assert torch.bfloat16 not in leaves(graph)


def test_factories_follow_the_model() -> None:
    def positions(x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[0], device=x.device)[:, None] + torch.ones((), dtype=x.dtype, device=x.device)

    graph, x = cleaned(positions, (3, 4)), torch.randn(6, 4)
    assert torch.equal(run(graph, x), positions(x))
    assert not any(isinstance(leaf, torch.device) for leaf in leaves(graph))
    assert torch.bfloat16 not in leaves(graph)


def test_a_dtype_argument_follows_its_input() -> None:
    graph = cleaned(lambda x: torch.softmax(x, -1, dtype=x.dtype), (3, 4))
    for dtype in (torch.float32, torch.bfloat16):
        assert run(graph, torch.randn(2, 4, dtype=dtype)).dtype == dtype


def test_assertions_copies_and_empty_operations_are_gone() -> None:
    def idle(x: Tensor) -> Tensor:
        return torch.cat([x.new_empty(0), x.detach()[:, :].to(x.dtype)]) * 2 if x.dim() == 1 else x.detach()[:] * 2

    graph = cleaned(idle, (3, 4))
    assert targets(graph) == [aten.mul.Tensor]


def test_nothing_concatenated_is_nothing() -> None:
    graph = fx.Graph()
    x = graph.placeholder("input_ids")
    empty = graph.get_attr("empty")
    both = graph.call_function(aten.cat.default, ([empty, x], -1))
    graph.output(graph.call_function(aten.neg.default, (both,)))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(0 if node is empty else (2, 3))
    clean(graph)
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "output"]


def test_what_is_concatenated_to_itself_stays() -> None:
    graph, x = cleaned(lambda x: torch.cat([x, x], -1), (3, 4)), torch.randn(2, 4)
    assert torch.equal(run(graph, x), torch.cat([x, x], -1))


def test_a_transposed_product_is_a_linear() -> None:
    for turned in (lambda w: w.T, lambda w: w.t(), lambda w: w.transpose(0, 1), lambda w: w.mT):
        graph = cleaned(lambda w, x, turned=turned: x @ turned(w), (3, 4), weight=(5, 4))
        assert targets(graph) == [aten.linear.default]
        x, weight = torch.randn(2, 4), torch.randn(5, 4)
        assert torch.allclose(run(graph, x, weight=weight), x @ weight.T)


def test_a_forward_does_not_change_weights() -> None:
    def clamped(weight: Tensor, x: Tensor) -> Tensor:
        weight.detach().clamp_(-1, 1)
        return x @ weight

    graph = cleaned(clamped, (3, 4), weight=(4, 5))
    assert targets(graph) == [aten.matmul.default]
