"""The zoo: families run with their features on, shrinking changes sizes only, real sizes have the published totals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.zoo import families, popular
from benchmarks.zoo.build import build, save, tokens
from benchmarks.zoo.causal import causal_config, causal_lm_types
from benchmarks.zoo.check import check, line
from benchmarks.zoo.overrides import CANNOT
from benchmarks.zoo.shrink import SIZES, layer_sample, shrink

LENGTH = 12


def forward(model: PreTrainedModel) -> Tensor:
    batch = tokens(model.config, 2, LENGTH)
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :7]
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", families.NAMES)
def test_a_family_runs_and_no_weight_is_degenerate(name: str) -> None:
    model = build(families.tiny_config(name), families.task_of(name))
    assert torch.isfinite(forward(model)).all()
    for key, parameter in model.named_parameters():
        plain = ((parameter == 0) | (parameter == 1)).float().mean().item()
        assert plain < 0.1, f"{key}: {plain:.0%} of the values are 0 or 1"
    assert model.num_parameters() < 200_000
    assert model.config.vocab_size <= 128


def test_equal_seeds_give_equal_weights_and_other_seeds_others() -> None:
    config = families.tiny_config("llama")
    first, again, other = (forward(build(config, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ONE_ROPE = {"sliding_attention": _ROPE, "full_attention": _ROPE}
FEATURES: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 64}),
    ("phi3", {"sliding_window": 64}),
    ("gemma2", {"sliding_window": 64}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"layer_types": ["full_attention"] * 4}),
    ("gemma3_text", {"sliding_window": 64}),
    ("gemma3_text", {"rope_parameters": _ONE_ROPE}),
    ("gemma3n_text", {"sliding_window": 64}),
    ("gemma3n_text", {"activation_sparsity_pattern": [0.0] * 4}),
    ("gemma3n_text", {"num_kv_shared_layers": 0}),
    ("llama4_text", {"attention_chunk_size": 64}),
    ("llama4_text", {"no_rope_layers": [1, 1, 1, 1]}),
    ("llama4_text", {"attn_temperature_tuning": False}),
    ("gpt_oss", {"sliding_window": 64}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
    ("deepseek_v3", {"routed_scaling_factor": 1.0}),
    ("bart", {"scale_embedding": False}),
    ("falcon-alibi", {"alibi": False}),
    ("falcon", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ("deberta-v2", {"pos_att_type": ["p2c"]}),
]


@pytest.mark.parametrize(
    ("name", "without"), FEATURES, ids=lambda value: value if isinstance(value, str) else next(iter(value))
)
def test_a_feature_is_felt_in_twelve_tokens(name: str, without: dict[str, Any]) -> None:
    config, task = families.tiny_config(name), families.task_of(name)
    model, plain = build(config, task), build(type(config).from_dict(config.to_dict() | without), task)
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(forward(model), forward(plain), atol=1e-4)


def test_sinks_relative_bias_and_router_corrections_are_felt() -> None:
    for name, part in (("gpt_oss", "sinks"), ("t5", "relative_attention_bias"), ("deepseek_v3", "correction_bias")):
        model = build(families.tiny_config(name), families.task_of(name))
        before = forward(model)
        state = {k: torch.zeros_like(v) if part in k else v for k, v in model.state_dict().items()}
        assert any(part in key for key in state)
        model.load_state_dict(state)
        assert not torch.allclose(before, forward(model), atol=1e-5), name


def test_structure_of_the_families() -> None:
    deepseek = families.tiny_config("deepseek_v3")
    assert deepseek.qk_nope_head_dim + deepseek.qk_rope_head_dim != deepseek.v_head_dim
    keys = set(build(deepseek).state_dict())
    assert "model.layers.0.mlp.gate_proj.weight" in keys
    assert "model.layers.1.mlp.shared_experts.gate_proj.weight" in keys
    assert families.tiny_config("gemma3n_text").num_kv_shared_layers == 2
    assert families.tiny_config("llama").num_key_value_heads < families.tiny_config("llama").num_attention_heads
    gated = build(families.tiny_config("t5-gated"), "seq2seq-lm").state_dict()
    assert "encoder.block.0.layer.1.DenseReluDense.wi_1.weight" in gated


@pytest.mark.parametrize("name", ["bert", "bart", "t5", "roberta", "distilbert", "deberta-v2"])
def test_dropout_is_on_in_training(name: str) -> None:
    model = build(families.tiny_config(name), families.task_of(name)).train()
    assert not torch.allclose(forward(model), forward(model))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "falcon-alibi"])
def test_a_saved_model_loads_the_same(name: str, tmp_path: Path) -> None:
    model = build(families.tiny_config(name))
    loaded = AutoModelForCausalLM.from_pretrained(save(model, tmp_path / name), attn_implementation="eager")
    assert torch.equal(forward(model), forward(loaded))


def test_layers_are_sampled_by_kind() -> None:
    kinds = ["sliding"] * 5 + ["full"]
    assert layer_sample([kinds * 2, [0] + [1] * 11]) == [0, 1, 2, 5]


def test_shrinking_keeps_lists_nested_configs_and_token_ids_in_step() -> None:
    out = shrink(
        {
            "vocab_size": 50000, "num_hidden_layers": 6, "layer_types": list("aaaaab"), "eos_token_id": [1, 49999],
            "bos_token_id": 40000, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 1e6,
            "text_config": {"hidden_size": 4096},
        }
    )  # fmt: skip
    assert out["layer_types"] == list("aaab")
    assert out["eos_token_id"] == [1, 127]
    assert out["bos_token_id"] < out["vocab_size"]
    assert (out["num_attention_heads"], out["num_key_value_heads"]) == (4, 2)
    assert (out["rope_theta"], out["text_config"]["hidden_size"]) == (1e6, SIZES["hidden_size"])


@pytest.mark.parametrize(
    "name",
    ["bamba", "big_bird", "deepseek_v32", "dbrx", "gemma4_text", "jamba", "mamba2", "qwen3_next", "reformer", "zamba"],
)
def test_an_odd_architecture_builds_and_runs(name: str) -> None:
    row = check(name)
    assert row.ran, row.reason
    assert row.parameters < 2_000_000


def test_what_cannot_run_says_why() -> None:
    assert len(causal_lm_types()) - len(CANNOT) >= 180
    assert line(check("gemma3n")).startswith("| gemma3n | no | no |")
    assert "timm" in check("gemma3n").reason
    assert causal_config("llama").vocab_size == SIZES["vocab_size"]


@pytest.mark.parametrize("name", sorted(popular.PARAMETERS))
def test_real_size_has_the_published_parameters(name: str) -> None:
    assert popular.parameters(popular.full(name)) == popular.PARAMETERS[name]


_SIZE_FIELDS = set(SIZES) | {
    "num_key_value_heads", "num_kv_heads", "n_group", "topk_group", "qk_head_dim", "layer_types", "no_rope_layers",
    "activation_sparsity_pattern", "num_kv_shared_layers", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


@pytest.mark.parametrize("name", popular.NAMES)
def test_a_shrunk_checkpoint_runs_and_differs_in_size_only(name: str) -> None:
    full, small = popular.full(name).to_dict(), popular.shrunk(name).to_dict()
    changed = {key for key in full.keys() | small.keys() if full.get(key) != small.get(key)}
    allowed = _SIZE_FIELDS | ({"rope_parameters"} if name == "Phi-3-mini-128k" else set())
    assert changed <= allowed, changed - allowed
    heads, kv = "num_attention_heads", "num_key_value_heads"
    if full.get(kv) and full[kv] != 1:
        assert full[heads] // full[kv] == small[heads] // small[kv]
    for kind in ("layer_types", "no_rope_layers"):
        assert set(full.get(kind) or []) == set(small.get(kind) or [])
    model = build(popular.shrunk(name))
    assert torch.isfinite(forward(model)).all()
    assert model.num_parameters() < 3_000_000


def test_a_longrope_keeps_one_factor_per_rotary_pair() -> None:
    config = popular.shrunk("Phi-3-mini-128k")
    rope, pairs = config.rope_parameters, config.hidden_size // config.num_attention_heads // 2
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == pairs
    assert set(rope["long_factor"]) <= set(popular.full("Phi-3-mini-128k").rope_parameters["long_factor"])


def test_padding_stands_left_in_the_first_row() -> None:
    batch = tokens(families.tiny_config("roberta"), 2, 6, padding=2)
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert batch["input_ids"][0, :2].tolist() == [1, 1]
