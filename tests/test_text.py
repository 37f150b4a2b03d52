"""The printed graph: golden files, depth, determinism, and what a digest tells apart."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import transformers

from surgeon import run, text
from surgeon.capture import capture_config
from surgeon.chains import chains, span
from surgeon.graph import Graph
from surgeon.passes.base import Pass
from surgeon.passes.dora import Dora
from surgeon.passes.lora import Lora
from surgeon.passes.prefix import Prefix
from surgeon.passes.token_rows import TokenRows
from surgeon.passes.vera import Vera

GOLDEN = Path(__file__).parent / "golden"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@functools.cache
def llama(layers: int = 4, **fields: Any) -> Graph:
    return capture_config(transformers.LlamaConfig(**SHAPE, num_hidden_layers=layers, vocab_size=64, **fields))


def assert_golden(name: str, found: str) -> None:
    """Equal to the file of that name; a wanted change is made by writing the text that the failure shows."""
    assert found.splitlines() == (GOLDEN / name).read_text(encoding="utf-8").splitlines()


def test_golden_llama() -> None:
    assert_golden("llama.txt", text.render(llama()))


@pytest.mark.parametrize(
    "step",
    [Lora(rank=2), Dora(rank=2), Vera(rank=2), Prefix(tokens=2), TokenRows(tokens="5,7")],
    ids=lambda step: step.name,
)
def test_golden_diff(step: Pass) -> None:
    assert_golden(f"llama_{step.name}.diff", text.diff(llama(), run.apply(llama(), step), 0))


def test_text_does_not_grow_with_depth() -> None:
    shallow, deep = text.render(llama()), text.render(llama(9))
    assert deep == shallow.replace("{0-3}", "{0-8}")
    assert text.diff(llama(), run.apply(llama(), Lora(rank=2))) == text.diff(
        llama(9), run.apply(llama(9), Lora(rank=2))
    ).replace("{0-8}", "{0-3}")


def test_two_captures_print_the_same() -> None:
    again = capture_config(transformers.LlamaConfig(**SHAPE, num_hidden_layers=4, vocab_size=64))
    assert text.render(again) == text.render(llama())
    assert text.digest(again) == text.digest(llama())
    assert text.diff(again, llama()) == ""


def test_digests_tell_structures_apart() -> None:
    graphs = [
        llama(),
        llama(9),
        llama(rms_norm_eps=1e-5),
        llama(hidden_act="gelu"),
        llama(attention_bias=True),
        run.apply(llama(), Lora(rank=2)),
        run.apply(llama(), Lora(rank=3)),
        run.apply(llama(), Lora(rank=2, alpha=1.0)),
        run.apply(llama(), Lora(rank=2, targets="model.layers.[0-1].self_attn.q_proj")),
        run.apply(llama(), Lora(rank=2, targets="model.layers.[1-2].self_attn.q_proj")),
        run.apply(llama(), Vera(rank=2)),
    ]
    assert len({text.digest(graph) for graph in graphs}) == len(graphs)


def test_layers_adapted_apart_are_printed_apart() -> None:
    printed = text.render(run.apply(llama(), Vera(rank=2, targets="model.layers.[0-1].self_attn.q_proj")))
    lines = [line.strip() for line in printed.splitlines()]
    assert "%model.layers/out = call model.layers.{0-3} in turn  [·, ·, 32]:" in lines
    assert any(line.startswith("model.layers.{0-1}(↻ %") and line.endswith("vera.A, vera.B)") for line in lines)
    assert any(line.startswith("model.layers.{2-3}(↻, %") and "vera" not in line for line in lines)


def test_kinds_of_layer_in_alternation() -> None:
    config = transformers.Gemma3TextConfig(**SHAPE, head_dim=8, num_hidden_layers=12, vocab_size=64)
    printed = text.render(capture_config(config))
    assert "call model.layers.{0-11} in turn" in printed
    assert "layer model.layers.{0-4,6-10}(" in printed
    assert "layer model.layers.{5,11}(" in printed


def test_a_layer_called_otherwise_starts_its_own_line() -> None:
    """T5's first block makes the position bias that later blocks are handed."""
    config = transformers.T5Config(d_model=32, d_ff=48, num_layers=4, num_heads=4, d_kv=8, vocab_size=64)
    graph = capture_config(config, "seq2seq-lm")
    assert [chain.paths for chain in chains(graph.trunk)] == [
        [f"{part}.block.{i}" for i in (1, 2, 3)] for part in ("encoder", "decoder")
    ]
    printed = text.render(graph)
    assert "call encoder.block.0(" in printed
    assert "call encoder.block.{1-3} in turn(↻ " in printed


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["h.0"], "h.0"),
        (["h.0", "h.1", "h.2"], "h.{0-2}"),
        (["h.0", "h.2", "h.3", "h.7"], "h.{0,2-3,7}"),
        (["a.0", "a.1", "b.0"], "a.{0-1}, b.0"),
        (["encoder.layer"], "encoder.layer"),
    ],
)
def test_span(paths: list[str], shown: str) -> None:
    assert span(paths) == shown
