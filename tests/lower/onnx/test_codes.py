"""Linears in codes as ONNX operators, run by ONNX Runtime, against what the codes decode to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import fx

from benchmarks.zoo.graphs import graph_of
from surgeon import run
from surgeon.fold import folds
from surgeon.graph import Graph, copied
from surgeon.hold import held_value, holders
from surgeon.lower.onnx import codes, products
from surgeon.lower.onnx.parts import lower_part
from surgeon.module import read_tensor
from surgeon.passes import make

GROUP = 16


def first_linear(graph: Graph, four_bit: str) -> tuple[fx.Node, list[torch.Tensor]]:
    """The first linear of a prepared graph's first layer, with its tensors."""
    path, layer = next(iter(graph.layers.items()))
    part, _ = copied(layer)
    codes.place(part, f"{path}.", graph, codes.Form(four_bit))
    kinds = (products.by_integers, products.by_book, products.by_bnb4, torch.ops.aten.linear.default)
    node = next(node for node in part.nodes if node.target in kinds)
    names = [f"{path}.{n.target}" for n in node.all_input_nodes if n.op == "get_attr"]
    return node, [read_tensor(graph, graph.resolve(name), None, torch.device("cpu")) for name in names]


def computed(
    node: fx.Node, tensors: list[torch.Tensor], x: torch.Tensor, folder: Path
) -> tuple[torch.Tensor, set[str]]:
    """What ONNX Runtime computes for one linear, and its operators."""
    single = fx.Graph()
    given = {n: single.placeholder(f"t{i}") for i, n in enumerate(node.all_input_nodes)}
    args = fx.node.map_arg(node.args, given.__getitem__)
    single.output((single.call_function(node.target, args, dict(node.kwargs)),))
    values = (x, *tensors)
    model = lower_part(single, values, values, 21)
    operators = {one.op_type for one in model.graph}
    model.graph.opset_imports["com.microsoft"] = 1
    ir.save(model, folder / "one.onnx")
    session = onnxruntime.InferenceSession(folder / "one.onnx", providers=["CPUExecutionProvider"])
    named = zip(session.get_inputs(), values, strict=True)
    (result,) = session.run(None, {one.name: np.asarray(value) for one, value in named})
    return torch.from_numpy(result), operators


def checked(graph: Graph, folder: Path, four_bit: str = "standard") -> set[str]:
    """The operators of the first linear, which computes what its codes decode to."""
    node, tensors = first_linear(codes.prepared(graph, codes.Form(four_bit)), four_bit)
    name = next(name for name, spec in graph.tensors.items() if spec.held is not None)
    weight = held_value(graph, name).double()
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    found, operators = computed(node, tensors, x, folder)
    expected = x.double() @ weight.t()
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    return operators


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["float", "integer", "symmetric"])
def test_integers_are_one_operator_with_a_sum_per_group_where_zeros_are_fractions(
    bits: int, zero: str, tmp_path: Path
) -> None:
    graph = run.apply(graph_of("llama"), make("intq", bits=bits, group=GROUP, zero=zero))
    operators = checked(graph, tmp_path)
    assert "MatMulNBits" in operators
    assert ("ReduceSum" in operators) == (zero == "float")


def test_groups_that_no_operator_takes_are_decoded(tmp_path: Path) -> None:
    graph = run.apply(graph_of("llama"), make("intq", group=8))
    assert checked(graph, tmp_path) <= {"MatMul", "Transpose", "Gemm", "Reshape"}


@pytest.mark.parametrize(("four_bit", "operator"), [("standard", "Gather"), ("bnb4", "MatMulBnb4")])
@pytest.mark.parametrize("double", [True, False])
def test_nf4(four_bit: str, operator: str, double: bool, tmp_path: Path) -> None:
    graph = run.apply(graph_of("llama"), make("nf4", double=double))
    assert operator in checked(graph, tmp_path, four_bit)


def test_what_stays_beside_the_codes_and_what_does_not() -> None:
    """QA-LoRA is in the zero points, LoRA beside the codes; DoRA reads the weight, which is decoded for it."""
    integers, nf4 = make("intq", group=GROUP), make("nf4")
    kept = {
        name: codes.with_codes(run.apply(graph_of("llama"), *steps))
        for name, steps in {
            "qalora": (integers, make("qalora")),
            "lora": (nf4, make("lora")),
            "dora": (nf4, make("dora")),
        }.items()
    }
    assert holders(kept["qalora"])
    assert not folds(kept["qalora"])
    assert holders(kept["lora"])
    assert folds(kept["lora"])
    assert not holders(kept["dora"])
