"""Shrink a config field by field: sizes become tiny, what the model computes stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Fields = dict[str, Any]

VOCAB = 128
LAYERS = 4
HIDDEN = 64
HEADS = 4
HEAD_DIM = 16
POSITIONS = 64
WINDOW = 4

_SAME: tuple[tuple[int, tuple[str, ...]], ...] = (
    (VOCAB, ("vocab_size", "decoder_vocab_size", "n_token", "vocab_size_per_layer_input", "pronunciation_vocab_size",
             "shape_vocab_size")),
    (LAYERS, (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks",
        "num_encoder_layers", "num_decoder_layers",
    )),
    (HIDDEN, (
        "hidden_size", "d_model", "n_embd", "dim_model", "emb_dim", "embedding_dim", "embedding_size", "lru_width",
        "attention_hidden_size", "word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "n_embed",
        "cross_attention_hidden_size", "backbone_hidden_size",
    )),
    (HEADS, (
        "num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads",
        "attention_heads",
        "num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_value_heads", "linear_num_heads",
        "index_n_heads", "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
        "swa_num_attention_heads", "num_heads",
    )),
    (HEAD_DIM, (
        "head_dim", "dim_head", "d_head", "d_kv", "attention_head_size", "attention_head_dim", "kv_channels",
        "global_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "index_head_dim", "kv_lora_rank",
        "state_size",
        "ssm_state_size", "mamba_d_state", "mamba_d_head", "mamba_head_dim", "mamba_headdim", "qk_nope_head_dim",
        "swa_head_dim", "laurel_rank", "hidden_size_per_layer_input", "shared_experts_intermediate_size",
        "time_step_rank", "mamba_dt_rank",
    )),
    (48, ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
        "expert_ffn_hidden_size",
         "moe_shared_expert_intermediate_size")),
    (96, ("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dim_ff", "n_inner", "ffn_hidden_size",
         "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size", "dff", "d_inner", "d_ff")),
    (24, ("q_lora_rank",)),
    (12, ("v_head_dim", "swa_v_head_dim")),
    (8, ("qk_rope_head_dim", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "rotary_dim", "index_topk",
        "chunk_size", "mamba_chunk_size", "o_lora_rank")),
    (POSITIONS, (
        "max_position_embeddings", "n_positions", "max_seq_len", "context_length", "max_source_positions",
        "max_target_positions", "model_max_length", "n_ctx", "max_sequence_length",
    )),
    (WINDOW, ("sliding_window", "attention_window_size", "window_size", "local_attention", "attention_chunk_size",
             "sliding_window_size")),
    (2, ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "linear_num_key_heads")),
    (1, ("first_k_dense_replace", "num_dense_layers")),
)  # fmt: skip
SIZES: dict[str, int] = {field: value for value, fields in _SAME for field in fields}

_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_query_groups", "swa_num_key_value_heads",
             "num_global_key_value_heads")  # fmt: skip
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
# One expert per token stays one, no dense layer stays none.
_COUNTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "first_k_dense_replace",
           "num_dense_layers")  # fmt: skip
_DEPTH = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")


def layer_sample(columns: Iterable[list[Any]], keep: int = LAYERS) -> list[int]:
    """Indices of `keep` layers in order that show each kind, a kind being equal entries in all per-layer lists."""
    kinds = [repr(row) for row in zip(*columns, strict=True)]
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:keep]
    rest = [i for i in range(len(kinds)) if i not in first]
    return sorted(first + rest[: keep - len(first)])


def shrink(fields: Mapping[str, Any], sizes: Mapping[str, Any] = SIZES) -> Fields:
    """`fields` with sizes from `sizes`, per-layer lists cut alike, token ids in the vocabulary, nested configs too."""
    out = {name: _value(name, value, fields, sizes) for name, value in fields.items()}
    out |= _per_layer(fields, sizes)
    if fields.get("head_dim") and fields["head_dim"] == fields.get("qk_rope_head_dim"):
        out["head_dim"] = out["qk_rope_head_dim"]
    if out.get("qk_head_dim") and out.get("qk_nope_head_dim"):
        out["qk_head_dim"] = out["qk_nope_head_dim"] + out["qk_rope_head_dim"]
    return _token_ids(out)


def _per_layer(fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> Fields:
    """The lists with one entry per layer, and `per_layer_config`, cut to the same `LAYERS` layers."""
    depth = next((fields[name] for name in _DEPTH if isinstance(fields.get(name), int)), 0)
    lists = {k: v for k, v in fields.items() if isinstance(v, list) and len(v) == depth and depth > LAYERS}
    own = {int(i): shrink(v, sizes) for i, v in (fields.get("per_layer_config") or {}).items()}
    columns = [*lists.values(), *([[own.get(i) for i in range(depth)]] if own else [])]
    if not columns:
        return {}
    chosen = layer_sample(columns)
    out: Fields = {name: [_value(name, column[i], fields, sizes) for i in chosen] for name, column in lists.items()}
    if own:
        out["per_layer_config"] = {new: own[old] for new, old in enumerate(chosen) if old in own}
    return out


def _value(name: str, value: Any, fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> Any:
    if isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
        return shrink(value, sizes)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in _KV_HEADS:
        heads = next((fields[h] for h in _HEADS if isinstance(fields.get(h), int)), value)
        return HEADS if value == heads else min(value, 2)
    if name in ("n_group", "num_expert_group", "topk_group"):
        return min(value, 1 if name == "topk_group" else 2)
    return min(value, sizes[name]) if name in _COUNTS else sizes.get(name, value)


def _token_ids(fields: Fields) -> Fields:
    vocab = fields.get("vocab_size")
    if not isinstance(vocab, int):
        return fields
    out, free = dict(fields), vocab - 1
    for name, value in fields.items():
        if not name.endswith(("_token_id", "_token_index", "_index", "_token_ids", "_tokens", "_id")):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value >= vocab:
            out[name], free = free, free - 1
        elif isinstance(value, list) and all(isinstance(v, int) for v in value):
            out[name] = [min(v, vocab - 1) for v in value]
    return out
