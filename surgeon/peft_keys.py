"""Names in PEFT's files: a module it adapts is wrapped, and what was inside is below `base_layer`.

Experts are parameters of one module, each with a wrapper: the first is the innermost. `nn.MultiheadAttention` is
wrapped for its input projection, and its output projection is adapted inside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from surgeon.graph import Graph
from surgeon.peft_targets import targeted
from surgeon.sites import EXPERTS, Site

PACKED = ".in_proj_weight"
"""The end of the name of the input projection of an `nn.MultiheadAttention`."""


def wrappers(sites: Iterable[Site]) -> dict[str, int]:
    """Path of a module → how many wrappers adapting these sites puts around it."""
    found: dict[str, int] = {}
    for site in sites:
        found[site.module] = found.get(site.module, 0) + 1
    return found


def below(name: str, around: Mapping[str, int]) -> str:
    """The name of a tensor or module where modules before its last word are wrapped."""
    words = name.split(".")
    found = []
    for count, word in enumerate(words[:-1], 1):
        found += [word, *["base_layer"] * around.get(".".join(words[:count]), 0)]
    return ".".join([*found, words[-1]])


def adapter_key(key: str, site: Site, sites: Sequence[Site], order: Mapping[str, int]) -> str:
    """The key of a site's own tensor, given as it would be if no other site were adapted.

    Args:
        key: `model.<module>.<leaf>`.
        site: the site.
        sites: all that the adapter is on.
        order: name of a parameter of the model → its place among them.
    """
    stem = f"model.{site.module}."
    if not key.startswith(stem):
        return key
    inside = [other for other in sites if other.kind == EXPERTS and other.module == site.module]
    outer = [other for other in inside if order[other.weight] > order[site.weight]]
    around = {**wrappers(sites), site.module: len(outer)}
    path = below(f"{site.module}.", around)
    return f"model.{path}{key.removeprefix(stem)}"


def module_sites(sites: Sequence[Site]) -> list[str]:
    """The paths for `target_modules`: not experts, nor what is adapted inside a module that is named."""
    inner = {f"{site.path}.out_proj" for site in sites if site.weight.endswith(PACKED)}
    return [site.path for site in sites if site.kind != EXPERTS and site.path not in inner]


def target_parameters(sites: Sequence[Site], graph: Graph) -> list[str] | None:
    """PEFT's names of the experts among the sites: the ends of their paths, as long as they name nothing else."""
    wanted = {site.weight for site in sites if site.kind == EXPERTS}
    if not wanted:
        return None
    names = [name for name, spec in graph.tensors.items() if spec.parameter and not spec.owner]
    ends = sorted({".".join(name.split(".")[-2:]) for name in wanted})
    return ends if {name for name in names if is_parameter(ends, name)} == wanted else sorted(wanted)


def targeted_sites(config: Mapping[str, Any], sites: Sequence[Site]) -> list[str]:
    """The paths of those sites that a PEFT config names: modules, and parameters of modules."""
    chosen = set(targeted(config, [site.path for site in sites if site.kind != EXPERTS]))
    chosen |= {f"{site.path}.out_proj" for site in sites if site.path in chosen and site.weight.endswith(PACKED)}
    names = config.get("target_parameters") or []
    chosen |= {site.path for site in sites if is_parameter(names, site.weight)}
    return [site.path for site in sites if site.path in chosen]


def is_parameter(targets: Collection[str], name: str) -> bool:
    """Whether `target_parameters` name a parameter."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def lone_projection(sites: Sequence[Site], all_sites: Iterable[Site]) -> str:
    """The path of an `nn.MultiheadAttention` of which one projection is adapted and the other not, or ""."""
    paths = {site.path for site in sites}
    packed = [site.path for site in all_sites if site.weight.endswith(PACKED)]
    return next((path for path in packed if (path in paths) != (f"{path}.out_proj" in paths)), "")
