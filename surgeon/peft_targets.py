"""PEFT's rules for which modules an adapter is on, in both directions.

Reading follows `peft.tuners.tuners_utils.check_target_module_exists`; writing finds the shortest `target_modules` and
patterns that PEFT reads back as exactly our sites.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from surgeon.errors import UsageError

ALL_LINEAR = "all-linear"
T = TypeVar("T")


def targeted(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Those of `paths` that a PEFT config targets; `all-linear` is left to the caller.

    Raises:
        UsageError: a pattern of the config is not a regular expression.
    """
    try:
        return [path for path in paths if _is_targeted(config, path)]
    except re.error as error:
        hint = "repair target_modules or exclude_modules"
        raise UsageError(f"a pattern is not a regular expression: {error}", "adapter_config.json", hint) from error


def _is_targeted(config: Mapping[str, Any], path: str) -> bool:
    excluded, targets = config.get("exclude_modules"), config.get("target_modules") or []
    if excluded and _named(excluded, path):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.get("modules_to_save") or []):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    return _named(targets, path) and _in_layers(config, path)


def _named(names: str | Sequence[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    stems = config.get("layers_pattern") or []
    if stems:
        forms = [rf"(?:^|.*?\.){stem}\.(?P<idx>\d+)\." for stem in ([stems] if isinstance(stems, str) else stems)]
    else:
        forms = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    found = next((match for form in forms if (match := re.match(form, path))), None)
    return found is not None and int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)


def target_modules(sites: Sequence[str], modules: Collection[str]) -> list[str] | str:
    """The `target_modules` that names `sites` and no other of `modules`: last names, else whole paths, else a regex."""
    leaves = sorted({path.rpartition(".")[2] for path in sites})
    for names in (leaves, sorted(sites)):
        if {path for path in {*modules, *sites} if _named(names, path)} == set(sites):
            return names
    return "|".join(re.escape(path) for path in sites)


def patterns(values: Mapping[str, T], default: T) -> dict[str, T]:
    """`rank_pattern` or `alpha_pattern`: the shortest one that gives every path its value and needs no order."""
    different = {path: value for path, value in values.items() if value != default}
    found: dict[str, T] = {}
    for leaf in dict.fromkeys(path.rpartition(".")[2] for path in different):
        own = {path: value for path, value in values.items() if path.rpartition(".")[2] == leaf}
        if len(set(own.values())) == 1:
            found[leaf] = next(iter(own.values()))
        else:
            found.update({path: value for path, value in own.items() if value != default})
    if all(lookup(found, path, default) == value for path, value in values.items()):
        return found
    return {f"^{re.escape(path)}": value for path, value in different.items()}


def lookup(pattern: Mapping[str, T], path: str, default: T) -> T:
    """PEFT's lookup: the first key that matches the end of the path."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
