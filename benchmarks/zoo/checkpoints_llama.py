"""Real `config.json` fields of Llama, Mistral, Qwen and relatives; published parameter totals (tied weights once)."""

from __future__ import annotations

from typing import Any

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "pretraining_tp": 1,
    "initializer_range": 0.02,
}
_LLAMA3 = _LLAMA | {
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_theta": 500000.0,
    "mlp_bias": False,
    "max_position_embeddings": 131072,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_position_embeddings": 131072,
}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "attention_bias": False,
    "head_dim": 128,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_position_embeddings": 40960,
}


def _shape(hidden: int, inner: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv}  # fmt: skip


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": _LLAMA | _shape(4096, 11008, 32, 32, 32) | {"max_position_embeddings": 4096, "rope_scaling": None},
    "Llama-2-70B": _LLAMA | _shape(8192, 28672, 80, 64, 8) | {"max_position_embeddings": 4096, "rope_scaling": None},
    "Llama-3-8B": _LLAMA3 | _shape(4096, 14336, 32, 32, 8) | {"max_position_embeddings": 8192, "rope_scaling": None},
    "Llama-3.1-8B": _LLAMA3 | _shape(4096, 14336, 32, 32, 8) | {"rope_scaling": _LLAMA3_ROPE},
    "Llama-3.2-1B": _LLAMA3 | _shape(2048, 8192, 16, 32, 8) | {
        "head_dim": 64, "tie_word_embeddings": True, "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0}},
    "Llama-3.2-3B": _LLAMA3 | _shape(3072, 8192, 28, 24, 8) | {
        "head_dim": 128, "tie_word_embeddings": True, "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0}},
    "CodeLlama-7B": _LLAMA | _shape(4096, 11008, 32, 32, 32) | {
        "vocab_size": 32016, "rope_theta": 1000000, "max_position_embeddings": 16384},
    "TinyLlama-1.1B": _LLAMA | _shape(2048, 5632, 22, 32, 4) | {"max_position_embeddings": 2048},
    "Yi-6B": _LLAMA | _shape(4096, 11008, 32, 32, 4) | {
        "vocab_size": 64000, "rope_theta": 5000000.0, "max_position_embeddings": 4096},
    "SmolLM2-135M": _LLAMA | _shape(576, 1536, 30, 9, 3) | {
        "vocab_size": 49152, "rope_theta": 100000, "tie_word_embeddings": True, "max_position_embeddings": 8192,
        "bos_token_id": 0, "eos_token_id": 0},
    "SmolLM3-3B": _LLAMA | _shape(2048, 11008, 36, 16, 4) | {
        "model_type": "smollm3", "vocab_size": 128256, "rope_theta": 5000000.0, "tie_word_embeddings": True,
        "mlp_bias": False, "max_position_embeddings": 65536, "rms_norm_eps": 1e-6, "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "no_rope_layers": [1, 1, 1, 0] * 9, "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004},
    "Mistral-7B-v0.1": _MISTRAL | {"vocab_size": 32000, "rope_theta": 10000.0, "sliding_window": 4096},
    "Mistral-7B-v0.3": _MISTRAL | {"vocab_size": 32768, "rope_theta": 1000000.0, "sliding_window": None},
    "Mistral-Nemo-12B": _MISTRAL | _shape(5120, 14336, 40, 32, 8) | {
        "vocab_size": 131072, "head_dim": 128, "rope_theta": 1000000.0, "sliding_window": None,
        "max_position_embeddings": 131072},
    "Mixtral-8x7B": _MISTRAL | {
        "model_type": "mixtral", "vocab_size": 32000, "rope_theta": 1000000.0, "sliding_window": None,
        "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02, "output_router_logits": False},
    "Qwen2-0.5B": _QWEN2 | _shape(896, 4864, 24, 14, 2) | {"tie_word_embeddings": True, "max_window_layers": 24},
    "Qwen2-7B": _QWEN2 | _shape(3584, 18944, 28, 28, 4) | {
        "vocab_size": 152064, "tie_word_embeddings": False, "max_window_layers": 28},
    "Qwen2.5-1.5B": _QWEN2 | _shape(1536, 8960, 28, 12, 2) | {"tie_word_embeddings": True, "max_window_layers": 28},
    "Qwen3-0.6B": _QWEN3 | _shape(1024, 3072, 28, 16, 8) | {"tie_word_embeddings": True, "max_window_layers": 28},
    "Qwen3-8B": _QWEN3 | _shape(4096, 12288, 36, 32, 8) | {"tie_word_embeddings": False, "max_window_layers": 36},
    "Qwen3-30B-A3B": _QWEN3 | _shape(2048, 6144, 48, 32, 4) | {
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
        "max_window_layers": 48, "router_aux_loss_coef": 0.001},
    "OLMo-1B": _LLAMA | _shape(2048, 8192, 16, 16, 16) | {
        "model_type": "olmo", "vocab_size": 50304, "tie_word_embeddings": True, "clip_qkv": None, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 50279},
    "OLMo-2-7B": _LLAMA | _shape(4096, 11008, 32, 32, 32) | {
        "model_type": "olmo2", "vocab_size": 100352, "rope_theta": 500000, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "pad_token_id": 100277, "bos_token_id": None, "eos_token_id": 100257},
    "Granite-3.0-2B": _LLAMA | _shape(2048, 8192, 40, 32, 8) | {
        "model_type": "granite", "vocab_size": 49155, "tie_word_embeddings": True, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.015625, "logits_scaling": 8.0, "attention_dropout": 0.1,
        "rope_theta": 10000, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}  # fmt: skip

PARAMETERS: dict[str, int] = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "CodeLlama-7B": 6_738_546_688,
    "TinyLlama-1.1B": 1_100_048_384,
    "Yi-6B": 6_061_035_520,
    "SmolLM2-135M": 134_515_008,
    "SmolLM3-3B": 3_075_098_624,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-12B": 12_247_782_400,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen2-0.5B": 494_032_768,
    "Qwen2-7B": 7_615_616_512,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
    "OLMo-1B": 1_176_764_416,
    "OLMo-2-7B": 7_298_617_344,
    "Granite-3.0-2B": 2_533_531_648,
}
