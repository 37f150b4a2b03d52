"""Methods that are several passes: what a paper calls by one name, and the options that it gives each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from surgeon.errors import UsageError, nearest
from surgeon.passes import PASSES, find
from surgeon.passes.base import Pass
from surgeon.select import ALL_EMBEDDINGS, ALL_LINEAR, ALL_NORMS, ATTENTION_LINEAR


@dataclass(frozen=True)
class Preset:
    """Several passes under one name.

    Attributes:
        summary: what it is, with its source.
        steps: names of the passes in order, with the options that differ from their own defaults.
    """

    summary: str
    steps: tuple[tuple[str, Mapping[str, Any]], ...]


PRESETS: Mapping[str, Preset] = {
    "qlora": Preset(
        "LoRA on every linear over 4-bit NF4 weights with double quantisation; train it with --precision bf16 "
        "--gradient-checkpointing --optimizer paged (Dettmers et al. 2023)",
        (("nf4", {}), ("lora", {"targets": ALL_LINEAR, "rank": 64, "alpha": 16.0, "dropout": 0.05})),
    ),
    "qa_lora": Preset(
        "group-pooled LoRA on every linear over 4-bit integers with float zero points, which a merge folds it into "
        "exactly (Xu et al. 2024)",
        (("intq", {}), ("qalora", {"rank": 64, "alpha": 16.0})),
    ),
    "longlora": Preset(
        "LoRA on the attention's linears, trained embeddings and norms, and shifted sparse attention while training; "
        "with --context the positions are scaled to that length (Chen et al. 2024)",
        (
            ("lora", {"targets": ATTENTION_LINEAR, "modules_to_save": f"{ALL_EMBEDDINGS},{ALL_NORMS}"}),
            ("shifted_sparse_attention", {}),
        ),
    ),
}


def passes_of(method: str) -> Mapping[str, Mapping[str, Any]]:
    """The names of the passes that a method or preset is, with the options that the preset gives them.

    Raises:
        UsageError: there is none of this name; the nearest ones are suggested.
    """
    name = method.replace("-", "_")
    if name not in PRESETS and name not in PASSES:
        raise UsageError(f"unknown method '{name}'", "--method", f"nearest: {nearest(name, [*PASSES, *PRESETS])}")
    return dict(PRESETS[name].steps) if name in PRESETS else {name: {}}


def steps_of(method: str, options: Mapping[str, Any]) -> list[Pass]:
    """The passes of a method or preset; each takes the options that it has.

    Raises:
        UsageError: the method is unknown, or none of its passes has an option.
    """
    chosen = passes_of(method)
    known = {step: {field.name for field in fields(find(step))} for step in chosen}
    for option in options:
        if not any(option in own for own in known.values()):
            every = sorted({word for own in known.values() for word in own})
            raise UsageError(f"{method} has no option '{option}'", "", f"nearest: {nearest(option, every)}")
    return [
        find(step).make({**fixed, **{key: value for key, value in options.items() if key in known[step]}})
        for step, fixed in chosen.items()
    ]
