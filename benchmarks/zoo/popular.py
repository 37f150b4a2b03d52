"""Popular checkpoints: their real config fields, at full size or shrunk in size only."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from benchmarks.zoo import checkpoints_llama, checkpoints_other
from benchmarks.zoo.shrink import HEAD_DIM, POSITIONS, SIZES, Fields, shrink

CHECKPOINTS: dict[str, Fields] = checkpoints_llama.CHECKPOINTS | checkpoints_other.CHECKPOINTS
PARAMETERS: dict[str, int] = checkpoints_llama.PARAMETERS | checkpoints_other.PARAMETERS
NAMES = tuple(CHECKPOINTS)

_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV = ("num_key_value_heads", "num_kv_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_BY_HAND: dict[str, Fields] = {
    # The two layers that share K/V need one of each kind before them.
    "Gemma-3n-E2B": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "Mamba-130M": {"intermediate_size": 128},
}


def full(name: str) -> PretrainedConfig:
    """The checkpoint's config as transformers reads it from its `config.json`; KeyError for a name not in `NAMES`."""
    fields = CHECKPOINTS[name]
    return CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))


def shrunk(name: str) -> PretrainedConfig:
    """`full(name)` with sizes reduced: query/key ratio, head/hidden relation, rope, layer kinds, multipliers stay."""
    config = full(name)
    fields = config.to_dict()
    small = shrink(fields, SIZES | _positions(fields)) | _heads(config, fields)
    small |= _window(fields) | _rope(fields, small) | _BY_HAND.get(name, {})
    kept = {k: v for k, v in small.items() if k not in ("transformers_version", "id2label", "label2id")}
    return CONFIG_MAPPING[config.model_type].from_dict(kept)


def parameters(config: PretrainedConfig) -> int:
    """Parameters of the causal LM of `config`, tied weights once, counted on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def _positions(fields: Fields) -> Fields:
    """Rotary models keep their lengths, which scale the angles; learned position tables shrink."""
    if not fields.get("rope_parameters"):
        return {}
    return {name: fields[name] for name in ("max_position_embeddings", "n_positions") if name in fields}


def _first(fields: Fields, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(fields.get(name), int)), None)


def _heads(config: PretrainedConfig, fields: Fields) -> Fields:
    """Head counts of the same query/key ratio, and a width that keeps its relation to heads × head_dim."""
    heads, kv, width = _first(fields, _HEADS), _first(fields, _KV), _first(fields, _WIDTH)
    if heads is None or width is None:
        return {}
    ratio = 1 if kv is None else fields[heads] // fields[kv]
    shared = kv is not None and fields[kv] == 1
    small = 4 if ratio == 1 or shared else 2 * ratio
    out: Fields = {heads: small}
    if kv is not None:
        out[kv] = small if ratio == 1 else (1 if shared else 2)
    own = fields.get("head_dim") if "kv_lora_rank" not in fields else None
    relation = fields[width] / (fields[heads] * own) if own else 1.0
    out[width] = max(8, 8 * math.ceil(small * HEAD_DIM * relation / 8))
    if fields.get("word_embed_proj_dim"):
        out["word_embed_proj_dim"] = out[width] * fields["word_embed_proj_dim"] // fields[width]
    if fields.get("rotary_dim"):
        out["rotary_dim"] = HEAD_DIM * fields["rotary_dim"] * fields[heads] // fields[width]
    return out


def _window(fields: Fields) -> Fields:
    """A window that the real lengths never reach stays unreachable."""
    window, longest = fields.get("sliding_window"), fields.get("max_position_embeddings")
    if window and longest and window >= longest:
        return {"sliding_window": 2 * max(longest, POSITIONS)}
    return {}


def _rope(fields: Fields, small: Fields) -> Fields:
    """The factors of longrope, one per rotary pair, sampled evenly for the smaller head."""
    rope: dict[str, Any] = fields.get("rope_parameters") or {}
    if "short_factor" not in rope:
        return {}
    pairs, step = HEAD_DIM // 2, len(rope["short_factor"]) / (HEAD_DIM // 2)
    lists = {k: [rope[k][int(i * step)] for i in range(pairs)] for k in ("short_factor", "long_factor")}
    return {"rope_parameters": small["rope_parameters"] | lists}
