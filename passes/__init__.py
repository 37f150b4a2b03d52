"""The passes, one method per file. `find` imports the file of the pass it is asked for, and no other."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from typing import Any

from surgeon.errors import UnsupportedError, UsageError, nearest
from surgeon.passes.base import Pass

PASSES = {
    "lora": "surgeon.passes.lora:Lora",
    "dora": "surgeon.passes.dora:Dora",
    "dylora": "surgeon.passes.dylora:DyLora",
    "adalora": "surgeon.passes.adalora:AdaLora",
    "vera": "surgeon.passes.vera:Vera",
    "ia3": "surgeon.passes.ia3:Ia3",
    "loha": "surgeon.passes.loha:Loha",
    "token_rows": "surgeon.passes.token_rows:TokenRows",
    "prompt": "surgeon.passes.prompt:Prompt",
    "prefix": "surgeon.passes.prefix:Prefix",
    "ptuning_v2": "surgeon.passes.ptuning_v2:PTuningV2",
    "shifted_sparse_attention": "surgeon.passes.shifted_sparse_attention:ShiftedSparseAttention",
    "nf4": "surgeon.passes.nf4:Nf4",
    "intq": "surgeon.passes.intq:IntQ",
    "qalora": "surgeon.passes.qalora:QaLora",
    "kv_cache": "surgeon.passes.kv_cache:KvCache",
    "slora": "surgeon.passes.slora:SLora",
}
# PEFT's name of a method → ours.
PEFT_TYPES = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "VERA": "vera",
    "IA3": "ia3",
    "LOHA": "loha",
    "TRAINABLE_TOKENS": "token_rows",
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "prompt",
}
# A field of PEFT's config that makes another method of one of these.
PEFT_SWITCHES = {("LORA", "use_dora"): "dora", ("LORA", "use_qalora"): "qalora"}


def find(name: str) -> type[Pass]:
    """The pass of this name, in which hyphens may stand for underscores.

    Raises:
        UsageError: there is none; the nearest names are suggested.
    """
    name = name.replace("-", "_")
    if name not in PASSES:
        raise UsageError(f"unknown method '{name}'", "--method", f"nearest: {nearest(name, PASSES)}")
    module, _, attribute = PASSES[name].partition(":")
    found: type[Pass] = getattr(importlib.import_module(module), attribute)
    return found


def make(name: str, **options: Any) -> Pass:
    """A pass with options; raises UsageError for an unknown name or option."""
    return find(name).make(options)


def parse(text: str) -> Pass:
    """The pass that an option string describes: `lora(rank=4, targets='*.q_proj')`, what `Pass.spec` writes.

    Raises:
        UsageError: the string is not of that form, or names an unknown pass or option.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return make(call.id)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords if word.arg}
            if len(options) == len(call.keywords):
                return make(call.func.id, **options)
    except (SyntaxError, ValueError):
        pass
    raise UsageError(f"cannot read the method '{text}'", "", "write it as lora or lora(rank=4, targets='*.q_proj')")


def find_peft(config: Mapping[str, Any]) -> type[Pass]:
    """The pass that reads the PEFT adapters of a config.

    Raises:
        UnsupportedError: there is none.
    """
    peft_type = str(config.get("peft_type", ""))
    for (kind, switch), name in PEFT_SWITCHES.items():
        if kind == peft_type and config.get(switch):
            return find(name)
    if peft_type not in PEFT_TYPES:
        raise UnsupportedError(
            f"PEFT's method {peft_type or '(none)'} cannot be read", "peft_type in adapter_config.json",
            f"supported: {', '.join(PEFT_TYPES)}",
        )  # fmt: skip
    return find(PEFT_TYPES[peft_type])
