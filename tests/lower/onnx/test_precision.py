"""What becomes of each linear in int4 and int8, and that the export computes it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from benchmarks.zoo import graphs
from surgeon import run
from surgeon.fold import fold, value_of
from surgeon.graph import Graph
from surgeon.lower.onnx import export, precision
from surgeon.passes import make


def adapted(*steps: tuple[str, dict[str, Any]], std: float, family: str = "llama") -> Graph:
    made = run.apply(graphs.graph_of(family), *(make(name, **options) for name, options in steps))
    return graphs.randomised(made, std=std)


def decided(graph: Graph, bits: str = "int4", four_bit: str = "standard") -> dict[str, set[str]]:
    """What became of linears → their names."""
    found: dict[str, set[str]] = {}
    for linear in precision.quantised(graph, bits, four_bit).linears:
        found.setdefault(linear.how, set()).add(linear.path.rpartition(".")[2])
    return found


LORA = ("lora", {"targets": "*.{q,v}_proj", "rank": 4})


def test_without_adapters_every_linear_and_the_head_are_codes() -> None:
    found = precision.quantised(graphs.graph_of("llama"), "int4", "standard")
    assert {linear.how for linear in found.linears} == {"quantise"}
    assert "lm_head" in {linear.path for linear in found.linears}
    assert all(0.05 < linear.error < 0.2 and linear.retention is None for linear in found.linears)


def test_a_large_adapter_is_requantised_and_a_small_one_stays_beside() -> None:
    assert decided(adapted(LORA, std=1.0))["requantise"] == {"q_proj", "v_proj"}
    small = adapted(LORA, std=0.002)
    assert decided(small)["side"] == {"q_proj", "v_proj"}
    lost = [linear for linear in precision.quantised(small, "int4", "standard").linears if linear.how == "side"]
    assert min(linear.retention or 0 for linear in lost) < precision.KEPT


def test_the_reference_is_the_base_in_codes_and_the_whole_adapter() -> None:
    """DoRA: a factor on the outputs as well."""
    graph = adapted(("dora", {"targets": "*.q_proj", "rank": 4}), std=0.002)
    found = precision.quantised(graph, "int4", "standard")
    row = next(linear for linear in found.linears if linear.how == "side")
    name = f"{row.path}.weight"
    exact, base = fold(graph).values[name], value_of(graph, name)
    codes = value_of(found.graph, name)
    change = (found.reference.values[name] - codes) - (exact - base)
    assert float(change.norm() / (exact - base).norm()) < 0.2  # s scales what codes are off by as well
    assert float((codes - base).norm() / base.norm()) > 0.05


def test_codes_that_the_base_has_stay() -> None:
    steps: tuple[Any, ...] = (("intq", {"group": 16, "zero": "integer"}), LORA)
    graph = adapted(*steps, std=0.002)
    found = precision.quantised(graph, "int4", "standard")
    assert {linear.how for linear in found.linears} == {"side", "quantise"}
    for linear in found.linears:
        name = f"{linear.path}.weight"
        if graph.tensors[name].held is not None:
            assert torch.equal(value_of(found.graph, name), value_of(graph, name))


def test_qalora_moves_zero_points_and_nf4_goes_to_eight_bits() -> None:
    moved = adapted(("intq", {"group": 16}), ("qalora", {"group": 16, "rank": 2}), std=0.05)
    assert set(decided(moved)) <= {"zero-points", "codes"}
    held = adapted(("nf4", {}), std=0.0)
    assert {linear.bits for linear in precision.quantised(held, "int4", "standard").linears} == {8}
    assert {linear.bits for linear in precision.quantised(held, "int4", "int4").linears} == {4}
    assert set(decided(held, four_bit="bnb4")) == {"codes"}


def test_the_export_computes_what_was_decided(tmp_path: Path) -> None:
    """Side paths beside MatMulNBits, replayed against torch, and told."""
    report = export.export_onnx(adapted(LORA, std=0.002), tmp_path / "onnx", precision="int4")
    assert report.token_agreement == 1.0
    assert report.change is not None
    assert 0.01 < report.change < 0.5
    nodes = Counter(node.op_type for node in ir.load(report.folder / export.MODEL).graph)
    assert nodes["MatMulNBits"] == len(report.linears)
    told = json.loads((report.folder / export.MANIFEST).read_text())["quantised"]
    assert told["change"] == report.change
    assert [row["path"] for row in told["linears"]] == [linear.path for linear in report.linears]


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["openvino", "genai"])
@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_every_profile_has_its_operators(profile: str, bits: str, tmp_path: Path) -> None:
    report = export.export_onnx(adapted(LORA, std=0.002), tmp_path / "onnx", precision=bits, profile=profile)
    assert report.token_agreement == 1.0
    nodes = Counter(node.op_type for node in ir.load(report.folder / export.MODEL).graph)
    assert nodes["DequantizeLinear" if profile == "openvino" else "MatMulNBits"] == len(report.linears)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "vera", "ia3", "loha", "adalora"])
def test_methods_beside_codes(method: str, tmp_path: Path) -> None:
    report = export.export_onnx(adapted((method, {}), std=0.01), tmp_path / "onnx", precision="int4")
    assert report.token_agreement == 1.0
    assert {linear.how for linear in report.linears} <= {"side", "requantise", "quantise"}
