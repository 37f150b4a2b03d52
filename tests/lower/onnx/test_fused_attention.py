"""Opset 23 by construction: ONNX's own Attention in graphs and in exports, or the reason why not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime_genai
import openvino
import pytest
import torch
from torch import fx

from benchmarks.zoo import graphs
from surgeon import run
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.lower.onnx import attention, export, opset_23
from surgeon.lower.onnx.profiles import BLOCKS, NBITS, OPSETS, find
from surgeon.lower.onnx.rows import is_written
from surgeon.passes import make
from tests.lower.onnx.runtimes import EXACT, by_genai, by_openvino
from tests.lower.onnx.test_opset_23 import HEADS, tensors

aten = torch.ops.aten


def fused(graph: Graph) -> tuple[Counter[Any], attention.Found]:
    found = attention.fuse(run.apply(graph, make("kv_cache")) if graph.task == "causal-lm" else graph)
    kinds = Counter(node.target for path in found.graph.layers for node in found.graph.layers[path].nodes)
    return kinds, found


@pytest.mark.parametrize(
    ("family", "rotations", "target"),
    [
        ("llama", 8, opset_23.cached),
        ("gemma3_text", 8, opset_23.cached),
        ("gpt_neox", 8, opset_23.cached),
        ("gpt2", 0, opset_23.cached),
        ("bert", 0, opset_23.attention),
    ],
)
def test_by_construction(family: str, rotations: int, target: Any) -> None:
    kinds, found = fused(graphs.graph_of(family))
    assert found.any
    assert (dict(found.reasons), kinds[opset_23.rotated]) == ({}, rotations)
    assert kinds[target] == len(found.graph.layers)
    assert torch.ops.surgeon.attention.default not in kinds


def test_keys_that_are_written_piece_by_piece_are_read_when_they_are_whole() -> None:
    """DeepSeek's: an empty tensor, and in-place copies into its views."""
    part = fx.Graph()
    made = part.call_function(aten.empty.memory_format, ([2, 4],))
    assert not is_written(made)
    piece = part.call_function(aten.slice.Tensor, (made, 1, 0, 2))
    part.call_function(aten.neg.default, (piece,))
    assert not is_written(made)
    part.call_function(aten.copy_.default, (piece, part.placeholder("x")))
    assert is_written(made)


def test_what_stays_in_standard_operators_is_said() -> None:
    kinds, found = fused(graphs.graph_of("gemma2"))
    assert not found.any
    assert ["softcap" in why for why in found.reasons] == [True]
    assert sorted(path for paths in found.reasons.values() for path in paths) == sorted(found.graph.layers)
    assert (kinds[torch.ops.surgeon.attention.default], kinds[opset_23.rotated]) == (4, 8)
    kinds, found = fused(run.apply(graphs.graph_of("llama"), make("prefix", tokens=2)))
    assert (kinds[opset_23.attention], dict(found.reasons)) == (4, {})


@pytest.mark.parametrize(
    ("more", "options", "why"),
    [
        ([], {}, ""),
        ([torch.ones(3, 3)], {"causal": True, "window": 3}, ""),
        ([torch.ones(3, 3).bool()], {}, "boolean"),
        ([None, torch.ones(HEADS)], {}, "sinks"),
        ([], {"softcap": 2.0}, "softcap"),
        ([], {"group": 4}, "grouped"),
    ],
)
def test_what_the_operator_expresses(more: list[torch.Tensor | None], options: dict[str, Any], why: str) -> None:
    part = fx.Graph()
    given: list[fx.Node | None] = []
    for number, value in enumerate([*tensors(2, 3, 3)[:4], *more]):
        given.append(None if value is None else part.placeholder(f"in_{number}"))
        if (node := given[-1]) is not None:
            node.meta["val"] = value
    options = {"scale": 1.0, **options}
    said = attention._unfit(part.call_function(torch.ops.surgeon.attention.default, tuple(given), options))
    assert bool(said) == bool(why)
    assert why in said


def test_profiles_at_an_opset() -> None:
    assert OPSETS == (21, 23)
    assert all(find(name).at(21) == find(name) for name in ("ort", "genai", "web", "openvino"))
    assert [find(name).at(23).integers for name in ("ort", "genai", "web")] == [BLOCKS, BLOCKS, NBITS]
    assert [find(name).at(23).contrib for name in ("ort", "genai", "web", "openvino")] == [False] * 4
    for wrong in (9, 22, 99):
        with pytest.raises(UsageError, match=f"no opset {wrong}") as error:
            find("ort").at(wrong)
        assert "21 or 23" in error.value.hint


SLOW: list[tuple[str, dict[str, Any]]] = [
    *(
        (family, {})
        for family in (
            "qwen3",
            "gemma3_text",
            "bert",
            "t5",
            "gpt_neox",
            "phi3",
            "llama4_text",
            "falcon",
            "bart",
            "deepseek_v3",
        )
    ),
    *(("llama", {"precision": precision}) for precision in ("fp16", "int8")),
    ("llama", {"adapters": "stacked"}),
    ("gemma3_text", {"precision": "int4", "adapters": "slots"}),
    ("llama", {"adapters": "slots", "prefix_slots": True}),
    ("llama", {"profile": "web", "precision": "int4"}),
]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {}),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in SLOW),
    ],
)
def test_exports(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Tokens and logits are torch's, alone and in a batch padded on the left; without an operator of com.microsoft."""
    report = export.export_onnx(graphs.graph_of(family), tmp_path / "onnx", opset=23, **options)
    assert (report.opset, report.attention, report.fallbacks) == (23, "fused", {})
    assert report.token_agreement == 1.0
    assert report.max_error is not None
    assert report.bound is not None
    assert 0 < report.max_error <= report.bound
    record = json.loads((report.folder / export.MANIFEST).read_text())
    assert (record["opset"], record["attention"]["operator"]) == (23, "Attention")
    models = [ir.load(file) for file in report.folder.rglob("*.onnx")]
    kinds = Counter(node.op_type for model in models for node in model.graph)
    assert kinds["Attention"] > 0
    assert kinds["Softmax"] == 0
    contrib = {node.op_type for model in models for node in model.graph if node.domain}
    assert contrib == ({"MatMulNBits"} if options.get("profile") == "web" else set())
    assert all(model.opset_imports[""] == 23 for model in models)


@pytest.mark.slow
def test_a_fallback_is_told_and_its_export_is_right(tmp_path: Path) -> None:
    report = export.export_onnx(graphs.graph_of("gemma2"), tmp_path / "onnx", opset=23)
    assert (report.attention, report.token_agreement) == ("standard", 1.0)
    said = json.loads((report.folder / export.MANIFEST).read_text())["attention"]
    assert (said["operator"], said["fallbacks"]) == ("standard", report.fallbacks)
    kinds = Counter(node.op_type for node in ir.load(report.folder / export.MODEL).graph)
    assert (kinds["RotaryEmbedding"], kinds["Softmax"], kinds["Attention"]) == (8, 4, 0)


@pytest.mark.slow
def test_other_runtimes_generate_the_same(tmp_path: Path) -> None:
    graph = graphs.graph_of("llama")
    report = export.export_onnx(graph, tmp_path / "openvino", opset=23, profile="openvino")
    assert report.replay is not None
    model = openvino.Core().compile_model(report.folder / export.MODEL, "CPU", EXACT)
    for batch in report.replay.batches:
        tokens, best = by_openvino(model, batch.prompts, len(batch.tokens[0]))
        assert tokens == batch.tokens
        assert np.abs(np.array(best) - np.array(batch.best_logits)).max() < 1e-5
    alone = report.replay.batches[0]
    made = export.export_onnx(graph, tmp_path / "genai", opset=23, profile="genai", verify=False)
    found = by_genai(onnxruntime_genai.Model(str(made.folder)), alone.prompts[0], len(alone.tokens[0]))
    assert found == alone.tokens[0]
