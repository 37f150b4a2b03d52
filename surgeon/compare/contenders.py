"""What is compared: every method with the settings it is recommended with, full fine-tuning, and the head alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgeon.errors import SurgeonError, UsageError, nearest
from surgeon.presets import passes_of
from surgeon.select import ALL_LINEAR

if TYPE_CHECKING:
    from surgeon.graph import Graph
    from surgeon.passes.base import Pass

FULL, HEAD = "full", "head"
_RANK16 = {"targets": ALL_LINEAR, "rank": 16, "alpha": 32.0}


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: as written with `--methods`.
        lr: around which learning rates are searched.
        options: of the method, those that differ from its own defaults.
        wide: whether it changes the base's own tensors and is no adapter.
    """

    name: str
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)
    wide: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return self.lr / 3, self.lr, self.lr * 3

    def passes(self) -> list[Pass]:
        """Its passes; none for what is no adapter."""
        from surgeon.presets import steps_of

        return [] if self.wide else steps_of(self.name, dict(self.options))


CONTENDERS: dict[str, Contender] = {
    one.name: one
    for one in (
        Contender("prefix", 1e-2, {"tokens": 20}),
        Contender("prompt", 5e-2, {"tokens": 20}),
        Contender("ptuning_v2", 1e-2, {"tokens": 20, "dropout": 0.0}),  # the other methods have none either
        Contender("lora", 2e-3, _RANK16),
        Contender("dora", 2e-3, _RANK16),
        Contender("dylora", 2e-3, {"targets": ALL_LINEAR, "rank": 16, "alpha": 32.0}),
        Contender("adalora", 3e-3, {"targets": ALL_LINEAR, "rank": 24, "target_rank": 16, "alpha": 48.0}),
        Contender("vera", 2e-2, {"targets": ALL_LINEAR, "rank": 256}),
        Contender("ia3", 1e-2),
        Contender("qlora", 2e-3, _RANK16),
        Contender("qa_lora", 1e-3, {"rank": 16, "alpha": 4.0}),
        Contender("longlora", 1e-3, {"rank": 16, "alpha": 32.0}),
        Contender(FULL, 5e-4, wide=True),
        Contender(HEAD, 2e-2, wide=True),
    )
}
SERVING = {"slora": "it serves adapters that others have trained, and trains none"}
"""Methods of the survey that have nothing to compare."""


def chosen(names: Sequence[str]) -> list[Contender]:
    """The contenders of these names; "all" is every one.

    Raises:
        UsageError: there is none of a name.
    """
    if "all" in names:
        return list(CONTENDERS.values())
    found = []
    for name in dict.fromkeys(word.replace("-", "_") for word in names):
        if name in SERVING:
            raise UsageError(f"{name} is not compared: {SERVING[name]}", "--methods", "leave it out")
        if name not in CONTENDERS:
            raise UsageError(f"unknown method '{name}'", "--methods", f"nearest: {nearest(name, CONTENDERS)}")
        found.append(CONTENDERS[name])
    return found


def fitted(graph: Graph, one: Contender) -> tuple[Contender, str]:
    """The contender with ranks that the layers of a model can have, and why the model cannot have it, or ""."""
    from surgeon.heads import head_modules
    from surgeon.planning import plan

    if one.wide:
        lacks_head = one.name == HEAD and not head_modules(graph)
        return one, "the model has no head of its own" if lacks_head else ""
    while True:
        try:
            plan(graph, *one.passes())
            return one, ""
        except SurgeonError as error:
            smaller = _smaller(one)
            if "above the size of the layer" not in error.what or smaller is None:
                return one, error.what + (f" ({error.where})" if error.where else "")
            one = smaller


def _smaller(one: Contender) -> Contender | None:
    """Half the rank at the same scale."""
    words = [word for word in ("rank", "target_rank", "alpha") if word in one.options]
    if "rank" not in words or one.options["rank"] < 2:
        return None
    return dataclasses.replace(one, options={**one.options, **{word: _half(one.options[word]) for word in words}})


def _half(value: float) -> float:
    return value // 2 if isinstance(value, int) else value / 2


def quantises(one: Contender) -> bool:
    """Whether it holds the base in codes."""
    from surgeon.passes import find

    return not one.wide and any(find(step).derived for step in passes_of(one.name))
