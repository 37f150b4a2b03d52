"""What a step of decoding runs: per layer ten operators, and no more than a handful before them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from benchmarks.zoo import build, graphs
from surgeon.graph import Graph
from surgeon.lower.onnx import export

LAYERS = 2
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip


def graph_of(kind: type[PretrainedConfig]) -> Graph:
    """A model whose heads have 16 channels, which the operator turns itself."""
    config = kind(**SIZES)
    return graphs.graph_over(build.build(config), config, "causal-lm")


def counted(report: export.OnnxReport) -> tuple[Counter[str], list[str]]:
    graph = ir.load(report.folder / export.MODEL).graph
    return Counter(node.op_type for node in graph), [str(value.name) for value in graph.inputs]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(Qwen2Config, "int4"), (LlamaConfig, "fp32"), pytest.param(LlamaConfig, "fp16", marks=pytest.mark.slow)],
)
def test_a_layer_is_a_handful_of_operators(kind: type[PretrainedConfig], precision: str, tmp_path: Path) -> None:
    """Replayed with a batch that is padded on the left; Qwen 2 has biases."""
    report = export.export_onnx(graph_of(kind), tmp_path / "onnx", precision=precision)
    assert report.token_agreement == 1.0
    found, inputs = counted(report)
    assert "position_ids" not in inputs
    assert found["GroupQueryAttention"] == LAYERS
    assert not found["RotaryEmbedding"] + found["Transpose"] + found["Neg"]
    if precision == "int4":
        assert found["MatMulNBits"] == 5 * LAYERS + 1
    if precision != "fp16":
        assert found["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
        assert found["SimplifiedLayerNormalization"] == 1


def test_adapters_that_may_preload_the_cache_keep_positions(tmp_path: Path) -> None:
    """Keys of a prefix are turned by nothing: how far the text is from them is not what a row counts."""
    report = export.export_onnx(graph_of(LlamaConfig), tmp_path / "onnx", adapters="slots")
    assert report.token_agreement == 1.0
    found, inputs = counted(report)
    assert "position_ids" in inputs
    assert found["RotaryEmbedding"] == 2 * LAYERS
