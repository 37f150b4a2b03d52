"""What a prefix costs: the published counts, from config.json alone, by `surgeon plan --json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, GPT2Config, PretrainedConfig, RobertaConfig

from surgeon.capture import capture_config
from surgeon.cli.main import main
from surgeon.passes import make
from surgeon.passes.base import Adapter
from surgeon.planning import plan
from surgeon.sites import sites


def gpt2(hidden: int, heads: int, layers: int) -> GPT2Config:
    return GPT2Config(n_embd=hidden, n_head=heads, n_layer=layers, architectures=["GPT2LMHeadModel"])


BART_LARGE = BartConfig(architectures=["BartForConditionalGeneration"])
ROBERTA_LARGE = RobertaConfig(
    hidden_size=1024, num_attention_heads=16, num_hidden_layers=24, intermediate_size=4096, vocab_size=50265,
    max_position_embeddings=514, type_vocab_size=1, architectures=["RobertaForSequenceClassification"],
)  # fmt: skip
# Row of the table of published numbers → model, options, trained, stored (of the prefix: no head).
ROWS: dict[str, tuple[PretrainedConfig, str, int, int]] = {
    "C-60": (gpt2(1024, 16, 24), "prefix(tokens=5)", 245_760, 245_760),
    "C-61": (gpt2(1024, 16, 24), "prefix(tokens=10)", 491_520, 491_520),
    "C-62": (gpt2(1024, 16, 24), "prefix(tokens=5, hidden=512)", 25_744_896, 245_760),
    "C-63": (gpt2(1280, 20, 36), "prefix(tokens=5)", 460_800, 460_800),
    "C-63b": (gpt2(1280, 20, 36), "prefix(tokens=10)", 921_600, 921_600),
    "C-64": (BART_LARGE, "prefix(tokens=200, hidden=800)", 62_130_528, 14_745_600),
    "C-65": (ROBERTA_LARGE, "prefix(tokens=8, targets=*)", 393_216, 393_216),
}
slow = {"C-63", "C-63b", "C-64", "C-65"}


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow if row in slow else ()) for row in ROWS])
def test_published_counts(row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, method, trained, stored = ROWS[row]
    config.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--method", method, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["trainable_parameters"] == trained
    assert found["stored_parameters"] == stored
    assert found["bytes"]["adapter"] == 4 * stored


@pytest.mark.parametrize(
    ("family", "options"), [("gemma2", {}), ("bart", {"hidden": 6}), ("llama", {"hidden": 6, "init": "gated"})]
)
def test_planned_counts_are_the_inserted_ones(family: str, options: dict[str, Any]) -> None:
    from benchmarks.zoo.graphs import graph_of
    from surgeon import fold, run

    base, step = graph_of(family), make("prefix", tokens=3, **options)
    graph, planned = run.apply(base, step), plan(base, step)
    assert planned.trainable_parameters == sum(spec.count for spec in graph.trainable().values())
    final = [item.columns() for item in fold.columns(graph)]
    gates = sum(spec.count for name, spec in graph.tensors.items() if name.endswith(".gate"))
    assert planned.stored_parameters == sum(c.k.numel() + c.v.numel() for c in final) + gates
    assert planned.flops_per_token.adapter == 3 * planned.flops_per_token.attention_per_position


def test_an_mlp_is_counted_once_per_kind_of_attention() -> None:
    tiny = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, architectures=["BartForConditionalGeneration"],
    )  # fmt: skip
    base = capture_config(tiny)
    step = make("prefix", tokens=5, hidden=7).prepare(base, sites(base, "attention"))
    assert isinstance(step, Adapter)
    assert step.shared_cost().trained == 3 * (5 * 32 + 7 * 32 + 7)
    assert step.shared_cost().stored == 0
