"""Every parameter read through ModelWeights has the bits that `from_pretrained` gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from surgeon.buffers import materialise_buffers
from surgeon.checkpoint import SINGLE, Checkpoint
from surgeon.errors import UnsupportedError, UsageError
from surgeon.unconvert import stored_parts
from surgeon.weights import ModelWeights

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE: dict[str, Any] = {**SMALL, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", "llama", SMALL),
    "llama_tied": ("AutoModelForCausalLM", "llama", {**SMALL, "tie_word_embeddings": True}),
    "gpt2": ("AutoModelForCausalLM", "gpt2", {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "qwen3": ("AutoModelForCausalLM", "qwen3", SMALL),
    "mixtral": ("AutoModelForCausalLM", "mixtral", MOE),
    "qwen3_moe": ("AutoModelForCausalLM", "qwen3_moe", {**MOE, "moe_intermediate_size": 16}),
    "gpt_oss": ("AutoModelForCausalLM", "gpt_oss", MOE),
    "deepseek_v3": (
        "AutoModelForCausalLM",
        "deepseek_v3",
        {**SMALL, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2}
        | {"topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16, "q_lora_rank": 12}
        | {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
    ),
    "gemma3": ("AutoModelForCausalLM", "gemma3_text", SMALL),
    "gemma3n": (
        "AutoModelForCausalLM",
        "gemma3n_text",
        {**SMALL, "num_hidden_layers": 3, "num_kv_shared_layers": 1, "vocab_size_per_layer_input": 48}
        | {"hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.9, 0.0, 0.0]}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "intermediate_size": [24, 24, 24]},
    ),
    "t5": (
        "AutoModelForSeq2SeqLM",
        "t5",
        {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4},
    ),
    "bart": (
        "AutoModelForSeq2SeqLM",
        "bart",
        {"vocab_size": 48, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24}
        | {"decoder_ffn_dim": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
    "bert": ("AutoModelForMaskedLM", "bert", SMALL),
    "opt": ("AutoModelForCausalLM", "opt", {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "phi3": ("AutoModelForCausalLM", "phi3", SMALL),
    "falcon": (
        "AutoModelForCausalLM",
        "falcon",
        {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}
CAUSAL = "AutoModelForCausalLM"


def build(auto: str, kind: str, options: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    config = AutoConfig.for_model(kind, **options)
    torch.manual_seed(1)
    with torch.device(device):
        return getattr(transformers, auto).from_config(config, dtype=dtype)


def random_checkpoint(folder: Path, auto: str, kind: str, options: dict[str, Any], dtype: torch.dtype) -> Checkpoint:
    model = build(auto, kind, options, "cpu", dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return Checkpoint.open(folder)


def meta_model(auto: str, folder: Path, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def same_as_from_pretrained(checkpoint: Checkpoint, auto: str, dtype: torch.dtype) -> ModelWeights:
    weights = ModelWeights(checkpoint, meta_model(auto, checkpoint.folder, dtype))
    torch.manual_seed(0)
    expected = getattr(transformers, auto).from_pretrained(checkpoint.folder, dtype=dtype).state_dict()
    assert set(weights) == set(expected)
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype == weights.dtype(name), name
        assert torch.equal(weights[name], value), name
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_from_pretrained(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    auto, kind, options = FAMILIES[family]
    checkpoint = random_checkpoint(tmp_path, auto, kind, options, dtype)
    weights = same_as_from_pretrained(checkpoint, auto, dtype)
    assert weights.missing == ()
    assert weights.unexpected == ()
    used = {source for name in weights for source in weights.sources(name)}
    assert used == set(checkpoint.tensors)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_values_are_cast_as_from_pretrained_casts(tmp_path: Path, stored: torch.dtype) -> None:
    for family in ("mixtral", "t5"):
        checkpoint = random_checkpoint(tmp_path / family, *FAMILIES[family], stored)
        same_as_from_pretrained(checkpoint, FAMILIES[family][0], torch.float16)


def test_a_direct_parameter_is_a_view_of_the_file(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path, *FAMILIES["llama_tied"], torch.float32)
    weights = ModelWeights(checkpoint, meta_model(CAUSAL, tmp_path, torch.float32))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert weights.direct(name) == name
    assert weights[name].data_ptr() == checkpoint.read(name).data_ptr()
    assert weights.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert weights.direct("lm_head.weight") == "model.embed_tokens.weight"
    with pytest.raises(KeyError):
        weights["model.nothing"]


def test_fused_experts_name_their_sources(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path, *FAMILIES["mixtral"], torch.float32)
    weights = ModelWeights(checkpoint, meta_model(CAUSAL, tmp_path, torch.float32))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert weights.direct(name) is None
    assert len(weights.sources(name)) == 8
    stem = "model.layers.0.block_sparse_moe.experts"
    assert set(weights.sources(name)) == {f"{stem}.{e}.{w}.weight" for e in range(4) for w in ("w1", "w3")}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama_tied"])
def test_values_go_back_to_the_tensors_they_came_from(tmp_path: Path, family: str) -> None:
    checkpoint = random_checkpoint(tmp_path, *FAMILIES[family], torch.float32)
    weights = ModelWeights(checkpoint, meta_model(CAUSAL, tmp_path, torch.float32))
    parts = stored_parts(weights, {name: weights[name] for name in weights if name not in weights.tied})
    assert set(parts) == set(checkpoint.tensors)
    assert all(torch.equal(parts[name], checkpoint.read(name)) for name in parts)


def test_a_base_checkpoint_gets_a_new_head(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path, "AutoModel", "bert", SMALL, torch.float32)
    auto = "AutoModelForSequenceClassification"
    before = torch.random.get_rng_state()
    weights = ModelWeights(checkpoint, meta_model(auto, tmp_path, torch.float32), seed=0)
    assert weights.missing == ("classifier.weight", "classifier.bias")
    assert weights["classifier.weight"].std() > 0
    assert torch.equal(torch.random.get_rng_state(), before)
    same_as_from_pretrained(checkpoint, auto, torch.float32)
    other = ModelWeights(checkpoint, meta_model(auto, tmp_path, torch.float32), seed=1)
    assert not torch.equal(other["classifier.weight"], weights["classifier.weight"])


def test_a_causal_checkpoint_in_a_plain_model_leaves_the_head_over(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path, *FAMILIES["llama"], torch.float32)
    weights = same_as_from_pretrained(checkpoint, "AutoModel", torch.float32)
    assert weights.unexpected == ("lm_head.weight",)


def rewrite(folder: Path, change: Any) -> Checkpoint:
    tensors = load_file(folder / SINGLE)
    save_file(change(tensors), folder / SINGLE, metadata={"format": "pt"})
    return Checkpoint.open(folder)


def test_gpt2_names_without_a_prefix_and_with_old_buffers(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, *FAMILIES["gpt2"], torch.float32)

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        return {**renamed, "h.0.attn.bias": torch.ones(1, 1, 64, 64)}

    weights = same_as_from_pretrained(rewrite(tmp_path, old), CAUSAL, torch.float32)
    assert weights.direct("transformer.wte.weight") == "wte.weight"
    assert weights.unexpected == ()


def test_only_the_alias_is_stored(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, *FAMILIES["llama_tied"], torch.float32)

    def swap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors}

    weights = same_as_from_pretrained(rewrite(tmp_path, swap), CAUSAL, torch.float32)
    assert weights.tied == {"model.embed_tokens.weight": "lm_head.weight"}


@pytest.mark.parametrize("same", [True, False])
def test_both_of_a_tied_pair_are_stored(tmp_path: Path, same: bool) -> None:
    random_checkpoint(tmp_path, *FAMILIES["llama_tied"], torch.float32)

    def both(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + (0 if same else 1)}

    weights = same_as_from_pretrained(rewrite(tmp_path, both), CAUSAL, torch.float32)
    assert weights.untied == (() if same else ("lm_head.weight",))
    assert bool(weights.tied) == same


def test_shapes_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path, *FAMILIES["llama"], torch.float32)
    model = build(CAUSAL, "llama", {**SMALL, "intermediate_size": 40}, "meta", torch.float32)
    with pytest.raises(UsageError, match=r"down_proj.*\[32, 24\] in the checkpoint and \[32, 40\]"):
        ModelWeights(checkpoint, model)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, *FAMILIES["mixtral"], torch.float32)
    gone = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    checkpoint = rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != gone})
    with pytest.raises(UsageError, match="gate_up_proj"):
        ModelWeights(checkpoint, meta_model(CAUSAL, tmp_path, torch.float32))


def test_a_quantised_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path, *FAMILIES["llama"], torch.float32)
    model = meta_model(CAUSAL, tmp_path, torch.float32)
    checkpoint.config["quantization_config"] = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedError, match="gptq"):
        ModelWeights(checkpoint, model)


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
LLAMA3 = {**SMALL, "rope_parameters": {**ROPE, "original_max_position_embeddings": 32}}
BUFFERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: FAMILIES[name] for name in ("llama", "gemma3", "gemma3n", "gpt_oss", "bert", "deepseek_v3", "gpt2", "t5")},
    "llama3": (CAUSAL, "llama", LLAMA3),
}


@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_are_those_of_from_pretrained(tmp_path: Path, family: str) -> None:
    auto, kind, options = BUFFERS[family]
    random_checkpoint(tmp_path, auto, kind, options, torch.float32)
    model = meta_model(auto, tmp_path, torch.float32)
    materialise_buffers(model)
    expected = dict(getattr(transformers, auto).from_pretrained(tmp_path).named_non_persistent_buffers())
    found = dict(model.named_non_persistent_buffers())
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert all(parameter.is_meta for parameter in model.parameters())
