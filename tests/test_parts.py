from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from benchmarks.zoo.graphs import graph_of
from surgeon.capture import capture_config
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.parts import Layout, layout_of
from surgeon.sites import CONV1D, LINEAR, sites

TINY = {"vocab_size": 112, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODERNBERT = TINY | {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2, "cls_token_id": 1,
    "sep_token_id": 2,
}  # fmt: skip
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 112}
CODEGEN = TINY | {"n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4}


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def layout(graph: Graph, leaf: str) -> str:
    site = next(site for site in sites(graph, LINEAR, CONV1D) if site.path.endswith(leaf))
    return str(layout_of(graph, site))


@pytest.mark.parametrize(
    ("family", "leaf", "expected"),
    [
        ("gpt2", "c_attn", "q32,k32,v32"),
        ("phi3", "qkv_proj", "q32,k16,v16"),
        ("gpt_neox", "query_key_value", "4*q8,k8,v8"),
        slow("bloom", "query_key_value", "4*q8,k8,v8"),
        ("falcon", "query_key_value", "2*q16,k8,v8"),
        slow("falcon-alibi", "query_key_value", "q32,k8,v8"),
        ("llama", "k_proj", "k16"),
        ("deepseek_v3", "kv_b_proj", "4*k12,v14"),
    ],
)
def test_outputs_are_told_apart_by_what_reads_them(family: str, leaf: str, expected: str) -> None:
    """The sizes are those of the code of each family: [q | k | v], per head, per group of heads."""
    assert layout(graph_of(family), leaf) == expected


@pytest.mark.parametrize(
    ("model", "fields", "task", "leaf", "expected"),
    [
        ("modernbert", MODERNBERT, "features", "Wqkv", "q32,k32,v32"),
        slow("mpt", MPT, "causal-lm", "Wqkv", "q32,k32,v32"),
        slow("codegen", CODEGEN, "causal-lm", "qkv_proj", "4*q8,v8,k8"),
    ],
)  # fmt: skip
def test_of_a_config_alone(model: str, fields: dict[str, object], task: str, leaf: str, expected: str) -> None:
    assert layout(capture_config(CONFIG_MAPPING[model](**fields), task), leaf) == expected


@pytest.mark.parametrize(
    ("family", "leaf", "what"),
    [
        ("llama", "o_proj", "no attention node reads it"),
        ("llama", "up_proj", "no attention node reads it"),
        ("deepseek_v3", "kv_a_proj_with_mqa", "its output 0 belongs to k and to v"),
    ],
)
def test_refused_by_name(family: str, leaf: str, what: str) -> None:
    with pytest.raises(UnsupportedError, match=what) as caught:
        layout(graph_of(family), leaf)
    assert caught.value.where.endswith(leaf)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["q32", "4*q8,k8,v8", "q4,-2,v8"])
def test_written_and_read(text: str) -> None:
    assert str(Layout.parse(text)) == text


def test_rows_of_a_part() -> None:
    found = Layout.parse("4*q8,-2,q1,v8")
    assert (found.parts, found.rows("q"), found.rows("k"), found.rows("v")) == (("q", "v"), 36, 0, 32)
    with pytest.raises(UsageError, match="'x3' is no layout"):
        Layout.parse("x3")
