"""Fields by hand for the architectures whose sizes no rule can guess."""

from __future__ import annotations

from typing import Any

_SSM = {"mamba_n_heads": 8, "mamba_d_head": 16}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _SSM | {"attn_layer_indices": [1, 3]},
    "beam": {"num_experts": 4, "n_group": 2, "topk_group": 1},
    "blt": {
        "encoder_hash_byte_group_vocab": 64, "vocab_size": 264, "local_attention_window_len": 8,
        "patching_mode": "space", "patcher_config": {"vocab_size": 264},
        "encoder_config": {"vocab_size": 264, "hidden_size_global": 64},
        "decoder_config": {"vocab_size": 264, "hidden_size_global": 64},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "topk_method": "greedy", "n_group": 1,
        "topk_group": 1},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dots3_note_text": {"head_dim": 24},
    "falcon_h1": _SSM | {"mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "granitemoehybrid": _SSM | {"layer_types": ["linear_attention", "full_attention"] * 2,
        "position_embedding_type": "rope"},
    "hrm_text": {"num_hidden_layers": 4, "num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 1, "L_bp_cycles": [1]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "time_step_rank": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "crop_size": 28, "image_size": 28, "patch_size": 14},
        "audio_config": {"nemo_conv_channels": 8, "hidden_size": 32, "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16, "ple_embed_dim": 16, "ngram_vocab_size_base": 64, "split_ngram_parts": 4,
        "heads_per_ngram": 2, "make_ngram_vocab_size_divisible_by": 8,
    },
    "reformer": {
        "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32], "attention_head_size": 16,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4, "num_buckets": 4, "hash_seed": 0, "attn_layers": ["local", "lsh", "local", "lsh"],
    },
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 2, "use_mamba_kernels": False,
        "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 8, "mamba_headdim": 16,
        "kv_channels": 16,
        "num_query_groups": 4, "adapter_rank": 8, "use_mamba_kernels": False, "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [2, 5],
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}  # fmt: skip
OVERRIDES["dots3_note"] = {
    "text_config": OVERRIDES["dots3_note_text"],
    "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
}
OVERRIDES["qwen4_exp"] = {"text_config": OVERRIDES["qwen4_exp_text"]}
EXTRA_INPUTS: dict[str, dict[str, Any]] = {"blt": {"use_cache": False}}

_DRAFTS = (
    "a draft head: it takes another model's hidden states and K/V instead of tokens, so it is no language model alone"
)
_MUSIC = "AutoModelForCausalLM hands its class the composite config, which lacks the decoder's fields"
CANNOT: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; the text model is gemma3n_text",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
    "xlnet": "transformers' own XLNet runs in fp32 alone (it makes its attention's matrices in fp32); traces are bf16",
}
