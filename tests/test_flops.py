"""The work on long texts, against LongLoRA's Table 11 and Figure 2 (Llama-2-7B, 2 operations per multiply-add)."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import transformers

from surgeon.capture import capture_config
from surgeon.graph import Graph
from surgeon.planning import Plan, plan
from surgeon.presets import steps_of


@functools.cache
def llama(context: int) -> Graph:
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
        num_key_value_heads=32, max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return dataclasses.replace(capture_config(config), context=context)


def work(planned: Plan) -> tuple[float, float]:
    """Operations on one text in 10¹², and the share of attention, without what the methods add."""
    assert planned.flops_per_text is not None
    text, token = planned.flops_per_text, planned.flops_per_token
    total = text.attention + token.base * text.length
    assert text.total == total + token.adapter * text.length
    return total / 1e12, text.attention / total


def test_whole_attention_at_65536() -> None:
    """C-71, C-73: 3118 T, of which 72.2 % attention."""
    total, share = work(plan(llama(65536)))
    assert total == pytest.approx(3117.8, abs=0.1)
    assert share == pytest.approx(0.722, abs=5e-4)


def test_segments_of_a_quarter() -> None:
    """C-72, C-73: 1429 T, of which 39.4 % attention."""
    total, share = work(plan(llama(65536), *steps_of("longlora", {})))
    assert total == pytest.approx(1429.0, abs=0.1)
    assert share == pytest.approx(0.394, abs=5e-4)


def test_attention_grows_with_the_square() -> None:
    """C-77: 16 times the attention for 4 times the text."""
    found = [plan(llama(length)).flops_per_text for length in (8192, 2048)]
    assert all(found)
    assert found[0].attention == 16 * found[1].attention  # type: ignore[union-attr]


def test_what_longlora_trains() -> None:
    """C-75: embeddings are 131,072,000 parameters, norms 266,240; LoRA of rank 8 on q, k, v, o is C-04's r=8."""
    planned = plan(llama(32768), *steps_of("longlora", {}))
    assert planned.trainable_parameters == 131_072_000 + 266_240 + 4 * 32 * 8 * (4096 + 4096)
    assert 131_072_000 / planned.base_parameters == pytest.approx(0.01945, abs=5e-5)
