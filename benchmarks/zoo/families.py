"""The conformance families: tiny, and with every feature on that makes the family what it is."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

WINDOW = 5
VOCAB = 112

_ALTERNATE = ["sliding_attention", "full_attention"] * 2
_TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "max_position_embeddings": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GQA = _BASE | {"num_key_value_heads": 2, "head_dim": 8}
_GEMMA = _GQA | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
_ENCODER = _BASE | {
    "num_hidden_layers": 2, "type_vocab_size": 2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.1,
    "decoder_start_token_id": 0,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_FALCON = {k: v for k, v in _BASE.items() if k != "intermediate_size"} | {"ffn_hidden_size": 64}

# name -> (model_type, task, fields)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "causal-lm", _GQA),
    "gemma2": ("gemma2", "causal-lm", _GEMMA | {
        "layer_types": _ALTERNATE, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", "causal-lm", _GEMMA | {"layer_types": _ALTERNATE, "rope_parameters": _TWO_ROPES}),
    "gemma3n_text": ("gemma3n_text", "causal-lm", _GEMMA | {
        "layer_types": _ALTERNATE, "rope_parameters": _TWO_ROPES, "num_kv_shared_layers": 2, "laurel_rank": 8,
        "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.6, 0.6, 0.0, 0.0], "altup_num_inputs": 3,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "final_logit_softcapping": 3.0}),
    "llama4_text": ("llama4_text", "causal-lm", _GQA | _MOE | {
        "attention_chunk_size": WINDOW, "no_rope_layers": [1, 0, 1, 0], "num_experts_per_tok": 1, "moe_layers": [1, 3],
        "layer_types": ["chunked_attention", "full_attention"] * 2, "intermediate_size_mlp": 64,
        "attn_temperature_tuning": True, "floor_scale": 4, "attn_scale": 0.1}),
    "gpt_oss": ("gpt_oss", "causal-lm", _GQA | _MOE | {
        "sliding_window": WINDOW, "layer_types": _ALTERNATE, "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 16, "rope_theta": 150000.0}}),
    "deepseek_v3": ("deepseek_v3", "causal-lm", _BASE | {
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
        "v_head_dim": 14, "head_dim": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "moe_intermediate_size": 24, "n_shared_experts": 1}),
    "t5": ("t5", "seq2seq-lm", _T5),
    "t5-gated": ("t5", "seq2seq-lm", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("bart", "seq2seq-lm", {
        "vocab_size": VOCAB, "max_position_embeddings": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "scale_embedding": True}),
    "bert": ("bert", "sequence-classification", _ENCODER | {"num_labels": 3}),
    "gpt2": ("gpt2", "causal-lm", _GPT2),
    "mistral": ("mistral", "causal-lm", _GQA | {"sliding_window": WINDOW}),
    "qwen3": ("qwen3", "causal-lm", _GQA | {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", "causal-lm", _BASE | {"num_key_value_heads": 2}),
    "phi": ("phi", "causal-lm", _BASE | {
        "qk_layernorm": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
            "partial_rotary_factor": 0.5}}),
    "phi3": ("phi3", "causal-lm", _BASE | {"num_key_value_heads": 2, "sliding_window": WINDOW}),
    "gpt_neox": ("gpt_neox", "causal-lm", _BASE | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    "opt": ("opt", "causal-lm", {k: v for k, v in _BASE.items() if k != "intermediate_size"} | {
        "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "mixtral": ("mixtral", "causal-lm", _GQA | _MOE),
    "qwen3_moe": ("qwen3_moe", "causal-lm", _GQA | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
        "mlp_only_layers": [0], "decoder_sparse_step": 1}),
    "falcon": ("falcon", "causal-lm", _FALCON | {
        "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True, "parallel_attn": True}),
    "falcon-alibi": ("falcon", "causal-lm", _FALCON | {
        "alibi": True, "multi_query": True, "parallel_attn": False, "bias": True}),
    "bloom": ("bloom", "causal-lm", {
        "vocab_size": VOCAB, "hidden_size": 32, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0}),
    "roberta": ("roberta", "masked-lm", _ENCODER | {"pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": ("distilbert", "masked-lm", {
        "vocab_size": VOCAB, "max_position_embeddings": 64, "n_layers": 2, "n_heads": 4, "dim": 32, "hidden_dim": 48,
        "dropout": 0.1, "attention_dropout": 0.1, "pad_token_id": 0}),
    "deberta-v2": ("deberta-v2", "token-classification", _ENCODER | {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16, "position_buckets": 4,
        "position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0,
        "pooler_hidden_size": 32}),
}  # fmt: skip

NAMES = tuple(_FAMILIES)
CAUSAL = tuple(name for name, (_, task, _fields) in _FAMILIES.items() if task == "causal-lm")


def tiny_config(name: str) -> PretrainedConfig:
    """The tiny config of a family in `NAMES`; families with two faces have two names (`t5-gated`, `falcon-alibi`)."""
    model_type, _, fields = _FAMILIES[name]
    return CONFIG_MAPPING[model_type](**fields)


def task_of(name: str) -> str:
    """The task to `build` the family for: most are causal LMs, T5 and BART seq2seq, the encoders have a head each."""
    return _FAMILIES[name][1]
