"""Real `config.json` fields of Gemma, Phi, GPT, DeepSeek and others; published parameter totals (tied weights once)."""

from __future__ import annotations

from typing import Any

_GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "vocab_size": 256000,
    "head_dim": 256,
    "attention_bias": False,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
}
_GEMMA2 = _GEMMA | {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096,
}
_GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_ctx": 1024,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
}
_NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_OPT: dict[str, Any] = {
    "model_type": "opt",
    "activation_function": "relu",
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "dropout": 0.1,
    "attention_dropout": 0.0,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
_FALCON: dict[str, Any] = {
    "model_type": "falcon",
    "vocab_size": 65024,
    "alibi": False,
    "bias": False,
    "parallel_attn": True,
    "multi_query": True,
    "layer_norm_epsilon": 1e-5,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bos_token_id": 11,
    "eos_token_id": 11,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "max_position_embeddings": 163840,
}
_YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv}  # fmt: skip


# Rounded to two decimals.
_PHI3_SHORT = [1.1, 1.1, 1.1, 1.3, 1.35, 1.35, 1.4, 1.55, *[2.0] * 17, *[2.05] * 6, 2.1, 2.1, 2.15, *[2.25] * 5,
               2.4, 2.45, 2.5, 2.7, 2.7, 2.75, 2.8, 2.9, 3.05]  # fmt: skip
_PHI3_LONG = [1.07, 1.12, 1.15, 1.42, 1.57, 1.8, 2.13, 2.13, 3.01, 5.91, 6.95, 9.07, 9.93, 10.71, 11.13, 14.61, 15.41,
    19.81,
              37.28, 38.28, 38.6, 40.12, 46.2, 50.94, 53.66, 54.94, 56.9, 57.29, 59.99, 60.87, 60.89, 61.72, 62.92,
              62.96,
              63.42, 63.82, 63.84, 63.9, 63.94, 64.07, 64.11, 64.12, 64.15, 64.19, 64.24, 64.57, 64.69,
              64.76]  # fmt: skip

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "Gemma-2B": _GEMMA | _shape(2048, 16384, 18, 8, 1) | {"model_type": "gemma"},
    "Gemma-2-2B": _GEMMA2 | _shape(2304, 9216, 26, 8, 4),
    "Gemma-2-9B": _GEMMA2 | _shape(3584, 14336, 42, 16, 8),
    "Gemma-3-1B": _GEMMA | _shape(1152, 6912, 26, 4, 1) | {
        "model_type": "gemma3_text", "vocab_size": 262144, "query_pre_attn_scalar": 256, "sliding_window": 512,
        "sliding_window_pattern": 6, "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "max_position_embeddings": 32768},
    "Gemma-3n-E2B": _GEMMA | _shape(2048, 8192, 30, 8, 2) | {
        "model_type": "gemma3n_text", "vocab_size": 262400, "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256, "intermediate_size": [8192] * 30, "num_kv_shared_layers": 10,
        "sliding_window": 512,
        "layer_types": ([*["sliding_attention"] * 4, "full_attention"]) * 6, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "activation_sparsity_pattern": [*[0.95] * 10, *[0.0] * 20],
        "altup_num_inputs": 4,
        "altup_active_idx": 0, "altup_correct_scale": True, "altup_coef_clip": 120.0, "laurel_rank": 64,
        "final_logit_softcapping": 30.0, "max_position_embeddings": 32768},
    "Phi-2": _shape(2560, 10240, 32, 32, 32) | {
        "model_type": "phi", "hidden_act": "gelu_new", "vocab_size": 51200, "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "rope_theta": 10000.0, "layer_norm_eps": 1e-5, "resid_pdrop": 0.1, "max_position_embeddings": 2048,
        "bos_token_id": 50256, "eos_token_id": 50256, "tie_word_embeddings": False},
    "Phi-3-mini-4k": _PHI3 | _shape(3072, 8192, 32, 32, 32) | {
        "sliding_window": 2047, "rope_scaling": None, "max_position_embeddings": 4096},
    "Phi-3-mini-128k": _PHI3 | _shape(3072, 8192, 32, 32, 32) | {
        "sliding_window": 262144, "max_position_embeddings": 131072,
        "rope_scaling": {"type": "longrope", "short_factor": _PHI3_SHORT, "long_factor": _PHI3_LONG}},
    "Phi-4": _PHI3 | _shape(5120, 17920, 40, 40, 10) | {
        "vocab_size": 100352, "rope_theta": 250000, "sliding_window": None, "rope_scaling": None,
        "max_position_embeddings": 16384, "original_max_position_embeddings": 16384, "bos_token_id": 100257,
        "eos_token_id": 100265, "pad_token_id": 100349},
    "GPT-2": _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "GPT-2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "GPT-J-6B": _GPT2 | {
        "model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "n_ctx": 2048,
        "rotary_dim": 64, "vocab_size": 50400, "tie_word_embeddings": False, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0},
    "GPT-NeoX-20B": _NEOX | {
        "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64,
        "vocab_size": 50432, "hidden_act": "gelu_fast"},
    "Pythia-160M": _NEOX | {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "vocab_size": 50304, "hidden_act": "gelu"},
    "OPT-125M": _OPT | {
        "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "word_embed_proj_dim": 768, "do_layer_norm_before": True},
    "OPT-350M": _OPT | {
        "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False},
    "Bloom-560M": {
        "model_type": "bloom", "vocab_size": 250880, "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16,
        "layer_norm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": False, "slow_but_exact": False,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    "Falcon-7B": _FALCON | {
        "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "new_decoder_architecture": False},
    "Falcon-40B": _FALCON | {
        "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8,
        "new_decoder_architecture": True},
    "MPT-7B": {
        "model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "expansion_ratio": 4, "max_seq_len": 2048,
        "vocab_size": 50432, "no_bias": True, "resid_pdrop": 0, "emb_pdrop": 0, "learned_pos_emb": True,
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_pdrop": 0, "attn_type": "multihead_attention",
                        "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None}},
    "StableLM-2-1.6B": _shape(2048, 5632, 24, 32, 32) | {
        "model_type": "stablelm", "hidden_act": "silu", "vocab_size": 100352, "partial_rotary_factor": 0.25,
        "use_qkv_bias": True, "layer_norm_eps": 1e-5, "rope_theta": 10000, "max_position_embeddings": 4096,
        "bos_token_id": 100257, "eos_token_id": 100257, "tie_word_embeddings": False},
    "StarCoder2-3B": _shape(3072, 12288, 30, 24, 2) | {
        "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "vocab_size": 49152, "use_bias": True,
        "rope_theta": 999999.4420358813, "sliding_window": 4096, "norm_epsilon": 1e-5, "residual_dropout": 0.1,
        "embedding_dropout": 0.1, "attention_dropout": 0.1, "max_position_embeddings": 16384, "bos_token_id": 0,
        "eos_token_id": 0},
    "DeepSeek-V2-Lite": _MLA | _shape(2048, 10944, 27, 16, 16) | {
        "model_type": "deepseek_v2", "vocab_size": 102400, "q_lora_rank": None, "moe_intermediate_size": 1408,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
        "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "bos_token_id": 100000,
        "eos_token_id": 100001},
    "DeepSeek-V3": _MLA | _shape(7168, 18432, 61, 128, 128) | {
        "model_type": "deepseek_v3", "vocab_size": 129280, "q_lora_rank": 1536, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid", "num_nextn_predict_layers": 1, "rope_scaling": _YARN | {"mscale": 1.0,
            "mscale_all_dim": 1.0},
        "bos_token_id": 0, "eos_token_id": 1},
    "gpt-oss-20b": _shape(2880, 2880, 24, 64, 8) | {
        "model_type": "gpt_oss", "hidden_act": "silu", "vocab_size": 201088, "head_dim": 64, "attention_bias": True,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "rope_theta": 150000, "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 4096},
        "max_position_embeddings": 131072, "initial_context_length": 4096, "pad_token_id": 199999,
        "eos_token_id": 200002},
    "Command-R": _shape(8192, 22528, 40, 64, 64) | {
        "model_type": "cohere", "hidden_act": "silu", "vocab_size": 256000, "logit_scale": 0.0625, "use_qk_norm": False,
        "layer_norm_eps": 1e-5, "rope_theta": 8000000.0, "attention_bias": False, "max_position_embeddings": 8192,
        "pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 255001},
    "Mamba-130M": {
        "model_type": "mamba", "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16,
        "expand": 2, "conv_kernel": 4, "intermediate_size": 1536, "time_step_rank": 48, "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True, "hidden_act": "silu", "residual_in_fp32": True, "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip

PARAMETERS: dict[str, int] = {
    "Gemma-2B": 2_506_172_416,
    "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-3-1B": 999_885_952,
    "Phi-2": 2_779_683_840,
    "Phi-3-mini-4k": 3_821_079_552,
    "Phi-3-mini-128k": 3_821_079_552,
    "Phi-4": 14_659_507_200,
    "GPT-2": 124_439_808,
    "GPT-2-medium": 354_823_168,
    "GPT-J-6B": 6_050_882_784,
    "GPT-NeoX-20B": 20_554_567_680,
    "Pythia-160M": 162_322_944,
    "OPT-125M": 125_239_296,
    "OPT-350M": 331_196_416,
    "Bloom-560M": 559_214_592,
    "Falcon-7B": 6_921_720_704,
    "Falcon-40B": 41_303_293_952,
    "MPT-7B": 6_649_286_656,
    "StableLM-2-1.6B": 1_644_515_328,
    "StarCoder2-3B": 3_030_371_328,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200 - 58 * 256,  # transformers keeps the routers' corrections as buffers
    "gpt-oss-20b": 20_914_757_184,
    "Command-R": 34_980_831_232,
    "Mamba-130M": 129_135_360,
}
