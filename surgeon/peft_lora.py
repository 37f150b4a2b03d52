"""LoRA's fields and keys in PEFT's files. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from surgeon.errors import UnsupportedError
from surgeon.passes.base import CONV1D, EMBEDDING, EXPERTS

if TYPE_CHECKING:
    from surgeon.passes.lora import Lora
    from surgeon.sites import Site

T = TypeVar("T")
# PEFT's initialisations that leave the base as it is, and those that move it by what can be computed again.
_PLAIN_INITS, _MOVING_INITS = (True, False, "gaussian", "eva", "orthogonal"), ("pissa", "olora")


def config(step: Lora, sites: Sequence[Site]) -> dict[str, Any]:
    """The fields of a LoRA at these sites; ranks and alphas per site as PEFT's patterns."""
    from surgeon.peft_targets import patterns

    ranks, alphas = {}, {}
    for site in sites:
        own = step.at(site)
        ranks[site.path] = own.bypass(site).whole_rank
        times = ranks[site.path] // own.rank
        alphas[site.path] = whole(own.alpha * (math.sqrt(times) if step.rslora else times))
    rank, alpha = _commonest(ranks, step.rank), _commonest(alphas, whole(step.alpha))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if any(site.kind == EXPERTS for site in sites) else step.dropout,
        "use_rslora": step.rslora,
        "rank_pattern": patterns(ranks, rank),
        "alpha_pattern": patterns(alphas, alpha),
        "fan_in_fan_out": any(site.kind == CONV1D for site in sites),
        "init_lora_weights": True,
        "exclude_modules": None,
        "use_dora": False,
        "lora_bias": step.lora_bias,
        "target_parameters": None,
    }


def keys(site: Site) -> dict[str, str]:
    """lora_A and lora_B, which have other names at an embedding, and change places where PEFT turns the experts."""
    stem = f"model.{site.module}.lora_"
    if site.kind == EMBEDDING:
        return {"a": f"{stem}embedding_A", "b": f"{stem}embedding_B"}
    if site.batched:
        return {"a": f"{stem}B.weight", "b": f"{stem}A.weight"}
    return {"a": f"{stem}A.weight", "b": f"{stem}B.weight"}


def options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the LoRA that a config describes, `init` only where it moved the base.

    PEFT's patterns are regular expressions over the end of a path; the first that matches wins, as here.

    Raises:
        UnsupportedError: the adapter was saved to a base that cannot be computed again.
    """
    init = config.get("init_lora_weights", True)
    turned = init == "olora" and config.get("fan_in_fan_out")  # PEFT decomposes the weight as it is stored
    if init not in _PLAIN_INITS and (init not in _MOVING_INITS or turned):
        raise UnsupportedError(
            f"the adapter was saved with init_lora_weights = {config['init_lora_weights']!r}, to a base it moved",
            "adapter_config.json",
            "save it with PEFT's path_initial_model_for_weight_conversion, which gives a plain LoRA",
        )
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    return {
        "rank": int(config.get("r", 8)),
        "alpha": float(config.get("lora_alpha", 8)),
        "dropout": float(config.get("lora_dropout") or 0),
        "rslora": bool(config.get("use_rslora")),
        "oversized": True,
        "lora_bias": bool(config.get("lora_bias")),
        "ranks": tuple((_suffix(key), int(rank)) for key, rank in ranks.items()),
        "alphas": tuple((_suffix(key), float(alpha)) for key, alpha in alphas.items()),
        **({"init": str(init)} if init in _MOVING_INITS else {}),
    }


def whole(number: float) -> float | int:
    """An integer where it is one, as people write them into configs."""
    return int(number) if float(number).is_integer() else number


def _suffix(key: str) -> str:
    return rf"re:(.*\.)?({key})"


def _commonest(values: Mapping[str, T], own: T) -> T:
    """The pass's own value where a site has it, else that of most sites."""
    found = list(values.values())
    return own if not found or own in found else max(found, key=found.count)
