"""Adapters that PEFT keeps in the file of another one: token rows in a LoRA's.

A part stands beside its host in the graph, as a pass of its own; on disk the two are one folder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from surgeon import replaced
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.passes import find
from surgeon.passes.base import Adapter, Pass

FIELDS = {"trainable_token_indices": "token_rows"}
"""A field of a host's config → the method that it asks for."""


def hosts(steps: Mapping[str, Pass], in_peft: Collection[str]) -> dict[str, str]:
    """Ids of parts → the id of the host whose file holds them: the last one before them.

    Args:
        steps: the passes of a graph, by id.
        in_peft: ids of those that have a form in PEFT.
    """
    found: dict[str, str] = {}
    for owner, step in steps.items():
        before = list(steps)[: list(steps).index(owner)]
        if isinstance(step, Adapter) and step.peft_host and owner in in_peft:
            host = [o for o in before if o in in_peft and _can_host(steps[o], step)]
            found.update({owner: host[-1]} if host else {})
    return found


def _can_host(step: Pass, part: Adapter) -> bool:
    return isinstance(step, Adapter) and step.peft_type == part.peft_host and not step.peft_lossy


def key_in_host(key: str, step: Adapter) -> str:
    """A part's own key as it is in its host's file."""
    stem, _, leaf = key.rpartition(".")
    return f"{stem}.{step.peft_part()[0]}{leaf}"


def fields(parts: Mapping[str, Adapter]) -> dict[str, Any]:
    """What the parts add to their host's config."""
    made: dict[str, Any] = {}
    for step in parts.values():
        for name, value in step.peft_part()[1].items():
            made[name] = {**made.get(name, {}), **value}
    return made


def described(graph: Graph, config: Mapping[str, Any]) -> list[Adapter]:
    """The parts that a host's config asks for.

    Raises:
        UnsupportedError: a module that it names is not in the model.
    """
    made = []
    for name, method in FIELDS.items():
        value = config.get(name)
        if not value:
            continue
        for module, indices in (value if isinstance(value, dict) else {"": value}).items():
            paths = [path for path in replaced.module_paths(graph) if path.endswith(module)] if module else [""]
            if len(paths) != 1:
                what = f"{name} names '{module}', and {len(paths)} modules of the model are called that"
                raise UnsupportedError(what, "adapter_config.json", "merge it with PEFT and use the merged model")
            step = find(method).make({"targets": paths[0], "tokens": ",".join(map(str, indices))})
            assert isinstance(step, Adapter)
            made.append(_checked(graph, step, name))
    return made


def _checked(graph: Graph, step: Adapter, field: str) -> Adapter:
    try:
        fitted = step.fitted(graph)
    except UsageError as error:
        raise UnsupportedError(
            f"{field}: {error.what}", "adapter_config.json", "name its own base with --base"
        ) from error
    return fitted
