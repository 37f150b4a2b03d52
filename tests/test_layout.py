"""Layered drawings: boxes below what they read, none on another, and whole layers of several families drawn."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from surgeon import run
from surgeon.blocks import Block, blocks
from surgeon.capture import capture_config
from surgeon.drawing import draw
from surgeon.layout import layout
from surgeon.passes.lora import Lora

SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


def test_boxes_stand_below_what_they_read_and_apart() -> None:
    reads = [[], [0], [0], [0], [1, 2], [4, 3], [0, 5]]
    widths = [50.0, 80.0, 30.0, 60.0, 40.0, 90.0, 20.0]
    placed = layout(widths, reads)
    assert placed.rank == [0, 1, 1, 1, 2, 3, 4]
    assert all(placed.rank[box] > placed.rank[source] for box, sources in enumerate(reads) for source in sources)
    for i in range(len(reads)):
        for j in range(i):
            if placed.rank[i] == placed.rank[j]:
                assert abs(placed.x[i] - placed.x[j]) >= (widths[i] + widths[j]) / 2
    assert len(placed.lanes[0, 6]) == 3
    assert all(0 <= x <= placed.width for x in placed.x)


def test_nothing_to_place() -> None:
    assert layout([], []).rows == 0


def titles(found: list[Block]) -> list[str]:
    return [block.title for block in found]


def test_a_llama_layer_in_blocks() -> None:
    config = transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=64)
    graph = run.apply(capture_config(config), Lora(rank=2, targets="q_proj"))
    found = blocks(graph.layers["model.layers.0"])
    assert sorted(titles(found)) == sorted(
        [
            "input", "input_layernorm", "q_proj", "k_proj", "v_proj", "a", "b", "× 8", "+", "rotary", "rotary",
            "attention", "o_proj", "+", "post_attention_layernorm", "gate_proj", "up_proj", "silu", "×", "down_proj",
            "+", "output",
        ]
    )  # fmt: skip
    new = [block for block in found if block.owner]
    assert titles(new) == ["a", "b", "× 8", "+"]
    assert [block.title for block in new[-1].reads] == ["q_proj", "× 8"]
    attention = next(block for block in found if block.kind == "attention")
    assert attention.detail == "4 heads, 2 K/V"
    assert titles(attention.reads) == ["rotary", "rotary", "v_proj"]


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), "causal-lm"),
        (transformers.MixtralConfig(**SHAPE, num_key_value_heads=2, vocab_size=64, num_local_experts=4), "causal-lm"),
        (transformers.BertConfig(**SHAPE, vocab_size=64), "features"),
        (transformers.T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=64), "seq2seq-lm"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_layers_of_other_families_are_drawn(config: transformers.PretrainedConfig, task: str) -> None:
    graph = capture_config(config, task)
    for part, _ in graph.parts():
        found = blocks(part)
        seen: set[int] = set()
        for block in found:
            assert all(id(source) in seen for source in block.reads), block.title
            seen.add(id(block))
        assert draw(part, "a layer").startswith("<svg")
