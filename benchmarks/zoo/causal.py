"""A tiny config for every causal-LM architecture that transformers registers."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.zoo.overrides import OVERRIDES
from benchmarks.zoo.shrink import shrink

_DROPPED = ("transformers_version", "model_type", "architectures", "_name_or_path", "id2label", "label2id")


def causal_lm_types() -> list[str]:
    """Every `model_type` that `AutoModelForCausalLM` knows, in transformers' order."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def causal_config(model_type: str) -> PretrainedConfig:
    """The default config of `model_type` with every size shrunk; a decoder where the architecture can be one."""
    kind = CONFIG_MAPPING[model_type]
    by_hand = OVERRIDES.get(model_type, {})
    if "__whole__" in by_hand:
        return kind(**{k: v for k, v in by_hand.items() if k != "__whole__"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = _decoder(kind().to_dict())
        return kind(**_merged({k: v for k, v in shrink(fields).items() if k not in _DROPPED}, by_hand))


def _decoder(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"is_decoder": True} if "is_decoder" in fields else fields


def _merged(fields: dict[str, Any], by_hand: dict[str, Any]) -> dict[str, Any]:
    """`by_hand` over `fields`, nested dicts merged key by key."""
    out = dict(fields)
    for name, value in by_hand.items():
        nested = isinstance(value, dict) and isinstance(out.get(name), dict) and name.endswith("_config")
        out[name] = _merged(out[name], value) if nested else value
    return out
