"""Planned numbers against published ones, and against what applying the methods really inserts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers

from benchmarks.zoo.graphs import graph_of
from surgeon import run
from surgeon.capture import capture_config
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.passes.adalora import AdaLora
from surgeon.passes.base import Pass
from surgeon.passes.lora import Lora
from surgeon.passes.vera import Vera
from surgeon.planning import plan

LLAMA = {
    "7B": (4096, 11008, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "65B": (8192, 22016, 80, 64),
    "GPT-3 175B": (12288, 49152, 96, 96),  # the widths of GPT-3, whose q, k, v and o are square
    "GPT-2 M": (1024, 4096, 24, 16),  # likewise, with q and v apart
}
ENCODERS: dict[str, tuple[type[transformers.PretrainedConfig], int, int, int, int]] = {
    "RoBERTa-base": (transformers.RobertaConfig, 768, 3072, 12, 12),
    "RoBERTa-large": (transformers.RobertaConfig, 1024, 4096, 24, 16),
    "DeBERTaV3-base": (transformers.DebertaV2Config, 768, 3072, 12, 12),
    "DeBERTa-v2-XXL": (transformers.DebertaV2Config, 1536, 6144, 48, 24),
}
SIX = "query_proj, key_proj, value_proj, *.attention.output.dense, *.intermediate.dense, *.[0-9]*.output.dense"
QKVO = "*.{q,k,v,o}_proj"


@functools.cache
def captured(name: str) -> Graph:
    if name in LLAMA:
        hidden, ffn, layers, heads = LLAMA[name]
        config: Any = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=32000, architectures=["LlamaForCausalLM"], dtype="float16",
        )  # fmt: skip
        return capture_config(config)
    kind, hidden, ffn, layers, heads = ENCODERS[name]
    config = kind(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads)
    return capture_config(config, "features" if "Ro" in name else "sequence-classification")


def lora(rank: int, targets: str = "*.{q,v}_proj") -> Lora:
    return Lora(rank=rank, targets=targets)


def vera(rank: int, targets: str = "*.{q,v}_proj") -> Vera:
    return Vera(rank=rank, targets=targets)


QV_ROBERTA = "query value"
QV_DEBERTA = "query_proj value_proj"
PUBLISHED: list[tuple[str, str, Pass, int]] = [
    ("C-01", "RoBERTa-base", lora(8, QV_ROBERTA), 294_912),
    ("C-24", "RoBERTa-base", vera(1024, QV_ROBERTA), 43_008),
    ("C-32 LoRA r=1", "RoBERTa-base", lora(1, QV_ROBERTA), 36_864),
    ("C-32 LoRA r=16", "RoBERTa-base", lora(16, QV_ROBERTA), 589_824),
    ("C-32 LoRA r=256", "RoBERTa-base", lora(256, QV_ROBERTA), 9_437_184),
    ("C-32 VeRA r=1", "RoBERTa-base", vera(1, QV_ROBERTA), 18_456),
    ("C-32 VeRA r=16", "RoBERTa-base", vera(16, QV_ROBERTA), 18_816),
    ("C-32 VeRA r=256", "RoBERTa-base", vera(256, QV_ROBERTA), 24_576),
    ("C-33 LoRA r=1", "RoBERTa-large", lora(1, QV_ROBERTA), 98_304),
    ("C-33 LoRA r=16", "RoBERTa-large", lora(16, QV_ROBERTA), 1_572_864),
    ("C-33 LoRA r=256", "RoBERTa-large", lora(256, QV_ROBERTA), 25_165_824),
    ("C-33 VeRA r=1", "RoBERTa-large", vera(1, QV_ROBERTA), 49_200),
    ("C-33 VeRA r=16, printed as 49.5K", "RoBERTa-large", vera(16, QV_ROBERTA), 49_920),
    ("C-33 VeRA r=256", "RoBERTa-large", vera(256, QV_ROBERTA), 61_440),
    ("C-03", "DeBERTa-v2-XXL", lora(16, QV_DEBERTA), 4_718_592),
    ("C-04, printed as 4.7M", "DeBERTa-v2-XXL", lora(8, QV_DEBERTA), 2_359_296),
    ("C-37", "DeBERTaV3-base", lora(8, SIX), 1_327_104),
    ("C-38", "DeBERTaV3-base", lora(2, SIX), 331_776),
    ("C-41", "DeBERTaV3-base", AdaLora(rank=12, targets=SIX), 1_991_520),
    ("C-05 v", "GPT-3 175B", lora(2, "v_proj"), 4_718_592),
    ("C-05 q+v", "GPT-3 175B", lora(1), 4_718_592),
    ("C-06 q+v", "GPT-3 175B", lora(2), 9_437_184),
    ("C-06 qkvo", "GPT-3 175B", lora(1, QKVO), 9_437_184),
    ("C-08 q+v", "GPT-3 175B", lora(8), 37_748_736),
    ("C-08 qkvo", "GPT-3 175B", lora(4, QKVO), 37_748_736),
    ("C-09, printed as 37.7M", "GPT-3 175B", lora(2, QKVO), 18_874_368),
    ("C-10", "GPT-3 175B", lora(64), 301_989_888),
    ("C-11", "GPT-3 175B", lora(64, QKVO), 603_979_776),
    ("C-35 r=1", "GPT-3 175B", vera(1), 2_359_488),
    ("C-35 r=16", "GPT-3 175B", vera(16), 2_362_368),
    ("C-35 r=256", "GPT-3 175B", vera(256), 2_408_448),
    ("C-26", "GPT-2 M", vera(1024), 98_304),
    ("C-28", "7B", vera(1024, "all-linear"), 1_589_248),
    ("C-30", "7B", vera(256, "all-linear"), 1_417_216),
    ("C-31 7B, C-44", "7B", lora(64, "all-linear"), 159_907_840),
    ("C-81", "7B", lora(64, QKVO), 67_108_864),
    ("C-31 13B", "13B", lora(64, "all-linear"), 250_347_520),
    ("C-47", "65B", lora(64, "all-linear"), 799_539_200),
]


@pytest.mark.parametrize(
    ("model", "method", "count"), [row[1:] for row in PUBLISHED], ids=[row[0] for row in PUBLISHED]
)
def test_published_counts(model: str, method: Pass, count: int) -> None:
    assert plan(captured(model), method).trainable_parameters == count


def test_published_vera_sizes_include_the_shared_matrices() -> None:
    """The paper's GPT-3 rows, 2.4M / 2.8M / 8.7M and 9.1 / 10.5 / 33 MB, count one A and one B: 192·d + 2·d·r."""
    stored = {rank: plan(captured("GPT-3 175B"), vera(rank)) for rank in (1, 16, 256)}
    for rank, found in stored.items():
        assert found.frozen_parameters == 2 * 12288 * rank
        assert found.stored_parameters == found.trainable_parameters + found.frozen_parameters
        assert found.bytes.adapter == 4 * found.stored_parameters


@pytest.mark.parametrize(("model", "count"), [("7B", 6_738_415_616), ("65B", 65_285_660_672)])
def test_published_model_sizes(model: str, count: int) -> None:
    found = plan(captured(model))
    assert found.base_parameters == count
    assert found.bytes.base == 2 * count
    assert (found.site_count, found.trainable_parameters, found.method) == (0, 0, "")


@pytest.mark.parametrize(
    ("width", "layers", "heads", "count"), [(1024, 24, 16, 354_823_168), (1280, 36, 20, 774_030_080)]
)
def test_tied_weights_count_once(width: int, layers: int, heads: int, count: int) -> None:
    config = transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads, architectures=["GPT2LMHeadModel"])
    assert plan(config).base_parameters == count


def test_flops_are_those_of_the_longlora_table() -> None:
    """LongLoRA's Table 11 at 65,536 tokens: 2251.8T attention, 281.5 + 567.3 + 17.2T projections, MLP and head."""
    flops = plan(captured("7B")).flops_per_token
    n = 65_536
    assert flops.attention_per_position * n * n / 1e12 == pytest.approx(2251.8, abs=0.05)
    assert flops.base * n / 1e12 == pytest.approx(281.5 + 567.3 + 17.2, abs=0.1)


def test_training_flops_are_two_forward_passes_and_the_gradients_of_the_adapter() -> None:
    found = plan(captured("7B"), lora(64, "all-linear"))
    flops = found.flops_per_token
    assert flops.adapter == 2 * found.trainable_parameters
    assert flops.forward == flops.base + flops.adapter
    assert flops.training_step == 2 * flops.forward + 2 * found.trainable_parameters


def test_experts_count_as_often_as_a_token_visits_them() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(
        **shape, num_hidden_layers=2, vocab_size=64, num_local_experts=4, num_experts_per_tok=2
    )
    attention = 32 * 32 * 2 + 32 * 16 * 2
    experts = 2 * 3 * 32 * 48 + 32 * 4
    assert plan(config).flops_per_token.base == 2 * (2 * (attention + experts) + 32 * 64)


@functools.cache
def tiny(**fields: Any) -> Graph:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return capture_config(transformers.LlamaConfig(**{**shape, "num_hidden_layers": 3, "vocab_size": 64, **fields}))


@pytest.mark.parametrize(
    "methods",
    [
        (lora(4),),
        (lora(4, "all-linear"),),
        (Lora(rank=4, targets="embed_tokens"),),
        (Lora(rank=4, ranks=(("*.0.*", 2), ("*.v_proj", 3)), targets="*.{q,v}_proj"),),
        (vera(8, "all-linear"),),
        (lora(4), vera(8, "all-linear"), lora(2, "down_proj")),
    ],
    ids=lambda methods: " + ".join(step.spec() for step in methods),
)
def test_planned_counts_are_measured_counts(methods: tuple[Pass, ...]) -> None:
    graph = tiny()
    found = plan(graph, *methods)
    inserted = {name: spec for name, spec in run.apply(graph, *methods).tensors.items() if spec.owner}
    assert found.trainable_parameters == sum(spec.count for spec in inserted.values() if spec.trainable)
    assert found.stored_parameters == sum(spec.count for spec in inserted.values())
    assert found.trainable_parameters == sum(site.trainable_parameters for site in found.sites)
    assert graph.applied == ()


@pytest.mark.parametrize(
    "methods",
    [
        (Lora(rank=4, modules_to_save="lm_head, model.norm"),),
        (Lora(rank=4, bias="sites"), Vera(rank=4, bias="all", modules_to_save="lm_head")),
        (Vera(rank=4, bias="all"),),
    ],
)
def test_planned_counts_with_tensors_of_the_base(methods: tuple[Pass, ...]) -> None:
    graph = tiny(attention_bias=True)
    measured = run.apply(graph, *methods).trainable().values()
    assert plan(graph, *methods).trainable_parameters == sum(spec.count for spec in measured)
    assert graph.trainable() == {}


def test_vera_without_its_projection_stores_the_vectors_alone() -> None:
    found = plan(tiny(), Vera(rank=4, save_projection=False))
    assert found.stored_parameters == found.trainable_parameters
    assert found.frozen_parameters == 4 * (32 + 32)
    assert found.bytes.training == found.bytes.base + 16 * found.trainable_parameters + 4 * found.frozen_parameters


def test_planned_bytes_are_measured_bytes() -> None:
    graph = tiny(dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(graph.config, dtype=torch.bfloat16)
    found = plan(graph, lora(4)).bytes
    assert found.base == sum(parameter.nbytes for parameter in model.parameters())
    assert found.training == found.base + 4 * found.adapter


def test_sites_carry_path_shape_method_and_rank() -> None:
    found = plan(tiny(), lora(4), lora(2))
    assert found.site_count == 12
    first, last = found.sites[0], found.sites[-1]
    assert (first.path, first.shape, first.method, first.rank) == (
        "model.layers.0.self_attn.q_proj",
        (32, 32),
        "lora",
        4,
    )
    assert (last.path, last.shape, last.method, last.rank) == ("model.layers.2.self_attn.v_proj", (16, 32), "lora_2", 2)
    assert first.trainable_parameters == 4 * 64
    assert found.methods == ("lora(rank=4)", "lora(rank=2)")


def test_a_dead_target_names_the_nearest_path() -> None:
    with pytest.raises(UsageError, match="no module matches 'qproj'") as caught:
        plan(tiny(), lora(4, "qproj"))
    assert "q_proj" in caught.value.hint


def test_a_rank_above_the_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="rank 33 is above the size of the layer"):
        plan(tiny(), lora(33))


def test_a_module_that_is_called_twice_is_one_site() -> None:
    """DeBERTa's queries are also the queries of its relative positions."""
    step = Lora(rank=3, targets="query_proj")
    graph = run.apply(graph_of("deberta-v2"), step)
    found = plan(graph_of("deberta-v2"), step)
    assert found.site_count == 2
    assert found.trainable_parameters == sum(spec.count for spec in graph.trainable().values() if spec.owner)


def test_a_token_costs_the_experts_it_is_sent_to() -> None:
    """Mixtral's tokens see 2 of 4 experts; each matrix of Llama 4's multiplies all tokens."""
    for family, used in (("mixtral", 2), ("llama4_text", 4)):
        step = Lora(rank=3, targets="*.experts.*")
        found = plan(graph_of(family), step)
        (up, down) = (3 * (32 + 96), 3 * (48 + 32))
        layers = found.site_count // 2
        assert found.flops_per_token.adapter == 2 * used * layers * (up + down)
        assert found.trainable_parameters == 4 * layers * (up + down)
