"""The passes, one method per file. `find` imports the file of the pass it is asked for, and no other."""

from __future__ import annotations

import importlib
from typing import Any

from surgeon.errors import UnsupportedError, UsageError, nearest
from surgeon.passes.base import Pass

PASSES = {
    "lora": "surgeon.passes.lora:Lora",
    "vera": "surgeon.passes.vera:Vera",
    "kv_cache": "surgeon.passes.kv_cache:KvCache",
}
# PEFT's name of a method → ours.
PEFT_TYPES = {"LORA": "lora", "VERA": "vera"}


def find(name: str) -> type[Pass]:
    """The pass of this name.

    Raises:
        UsageError: there is none; the nearest names are suggested.
    """
    if name not in PASSES:
        raise UsageError(f"unknown method '{name}'", "--method", f"nearest: {nearest(name, PASSES)}")
    module, _, attribute = PASSES[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(module), attribute)
    return found


def make(name: str, **options: Any) -> Pass:
    """A pass with options; raises UsageError for an unknown name or option."""
    return find(name).make(options)


def find_peft(peft_type: str) -> type[Pass]:
    """The pass that reads PEFT adapters of this type.

    Raises:
        UnsupportedError: there is none.
    """
    if peft_type not in PEFT_TYPES:
        raise UnsupportedError(
            f"PEFT's method {peft_type or '(none)'} cannot be read", "peft_type in adapter_config.json",
            f"supported: {', '.join(PEFT_TYPES)}",
        )  # fmt: skip
    return find(PEFT_TYPES[peft_type])
