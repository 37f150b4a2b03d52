"""How many tokens a model has positions for, and making it more by scaling its rotary positions.

Positions are divided by a factor (position interpolation, Chen et al. 2023): a model that counted to n sees n · factor
tokens at angles it knows. LongLoRA (§4.1) does this before it trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from surgeon.errors import UnsupportedError, UsageError

_PLAIN = ("default", "linear")


def limit(config: Any) -> int:
    """Tokens the model was made for, 0 for no limit: its positions, times the factor they are divided by."""
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return 0
    return math.floor(positions * max([1.0, *(factor(table) for table in _tables(text))]))


def factor(table: dict[str, Any]) -> float:
    """What positions are divided by. Of the other scalings the config's own number of positions tells the length."""
    return float(table.get("factor", 1.0)) if table.get("rope_type") == "linear" else 1.0


def extend(config: Any, tokens: int) -> None:
    """Scale the rotary positions of a config so that it reaches `tokens`; nothing where it does already.

    The factor is the config's own times ⌈tokens / limit⌉. Layers with a sliding window keep their positions: what they
    see lies within the window.

    Raises:
        UsageError: `tokens` is no length, or the model counts positions with a table of learned rows.
        UnsupportedError: it scales its positions in a way that has its own limit.
    """
    if tokens <= 0:
        raise UsageError(f"a context of {tokens} tokens", "--context", "a number of tokens, for example 32768")
    text, known = config.get_text_config(decoder=True), limit(config)
    tables = list(_tables(text))
    if not known or tokens <= known or getattr(text, "alibi", False):
        return
    if not tables:
        what = f"{text.model_type} has a table of {known} learned positions, which cannot be scaled"
        raise UsageError(what, "--context", f"at most {known}, or a model with rotary positions")
    own = next((table["rope_type"] for table in tables if table.get("rope_type", "default") not in _PLAIN), None)
    if own is not None:
        what = f"{text.model_type} scales its positions by {own} already, up to {known} tokens"
        raise UnsupportedError(what, "rope_parameters in config.json", f"--context of at most {known}")
    times = math.ceil(tokens / known)
    for table in tables:
        table.update(rope_type="linear", factor=factor(table) * times)


def update(config: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json must say of scaled positions, in the fields that the base's own has.

    Args:
        config: the scaled config.
        stored: the base's config.json.
    """
    text = config.get_text_config(decoder=True)
    nested = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    own = stored.get(nested, {}) if nested else stored
    if "rope_parameters" in own:
        found: dict[str, Any] = {"rope_parameters": dict(text.rope_parameters)}
    else:
        found = {"rope_scaling": {"rope_type": "linear", "factor": max(map(factor, _tables(text)))}}
    return {nested: found} if nested else found


def _tables(text: Any) -> Iterator[dict[str, Any]]:
    """The rotary tables of layers that see the whole text."""
    found = getattr(text, "rope_parameters", None)
    if not isinstance(found, dict):
        return
    nested = {kind: table for kind, table in found.items() if isinstance(table, dict) and "rope_type" in table}
    if not nested:
        yield found
    for kind, table in nested.items():
        if "sliding" not in kind and "chunked" not in kind:
            yield table
