"""A plain PEFT adapter folder as the graph of its base with the adapter applied."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from surgeon import heads, peft_parts, peft_qalora, replaced
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.labels import LABELLED, placeholders
from surgeon.passes import find_peft
from surgeon.passes.base import Adapter
from surgeon.peft_files import CONFIG, TASK_TYPES, WEIGHTS, fill, read_config, read_tensors
from surgeon.peft_keys import targeted_sites
from surgeon.peft_targets import ALL_LINEAR
from surgeon.run import apply, chosen_sites, owners
from surgeon.sites import sites
from surgeon.source import open_graph, open_source
from surgeon.tasks import TASKS

if TYPE_CHECKING:
    import torch

# Fields that surgeon reads, or that say how an adapter was made and not what it computes.
_KNOWN = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "bias", "r",
    "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "init_lora_weights",
    "use_dora", "eva_config", "loftq_config", "runtime_config", "megatron_core", "vera_dropout", "d_initial",
    "init_weights",
    "projection_prng_key", "save_projection", "num_virtual_tokens", "token_dim", "num_transformer_submodules",
    "num_attention_heads", "num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
    "tokenizer_kwargs", "prefix_projection", "encoder_reparameterization_type", "encoder_hidden_size",
    "target_parameters", "encoder_num_layers", "encoder_dropout", "feedforward_modules", "init_ia3_weights",
    "lora_bias", "token_indices", "trainable_token_indices", "use_qalora", "qalora_group_size",
)  # fmt: skip


def load_adapter(folder: str | Path, base: str | Path | None = None, task: str | None = None) -> Graph:
    """The base an adapter names (or `base`), with the adapter applied and its values in place.

    Args:
        folder: an adapter folder as PEFT or surgeon writes it.
        base: the base, where the name in the config no longer holds.
        task: see `surgeon.tasks`; the adapter's own `task_type` if not given.

    Raises:
        UnsupportedError: the adapter uses something surgeon has no pass for; the field is named.
        UsageError: the folder or the base is damaged, or they do not belong together.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), read_tensors(folder / WEIGHTS)
    find_peft(config)
    _check_fields(config, folder)
    where = base or config.get("base_model_name_or_path")
    if not where:
        raise UsageError("the adapter names no base model", str(folder / CONFIG), "name it with --base")
    task = task or _task(config)
    source = open_source(_base_path(str(where), folder, given=base is not None), task)
    classes = heads.classes_in(tensors) if source.task.name in LABELLED else 0
    if classes and classes != source.config.num_labels:
        source = open_source(source.folder, source.task.name, labels=placeholders(classes))
    return adapt(open_graph(source), folder, config, tensors)


def adapt(graph: Graph, folder: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Graph:
    """The graph of a base with the adapter of a folder, read already, applied; raises as `load_adapter` does."""
    method = find_peft(config)
    _check_fields(config, folder)
    method, config, meant = peft_qalora.resolved(graph, method, config, tensors)
    step = dataclasses.replace(describe(graph, cast(type[Adapter], method), config), **meant)
    if step.peft_prompt:
        step = step.saving(graph, heads.trained_in(graph, tensors))
    graph = apply(graph, step, *peft_parts.described(graph, config))
    fill_all(graph, folder, tensors)
    return graph


def fill_all(graph: Graph, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The tensors of an adapter's file into a graph that has its pass, and those of its parts, applied last."""
    made = [(owner, step) for owner, step in owners(graph.applied).items() if isinstance(step, Adapter)]
    (owner, host), *parts = made
    fill(graph, owner, host, tensors, folder / WEIGHTS, dict(parts))


def _task(config: Mapping[str, Any]) -> str | None:
    """What the adapter says its base is for: its task type, or the class it was trained on."""
    by_type = {peft: name for name, peft in TASK_TYPES.items()}
    trained_on = str((config.get("auto_mapping") or {}).get("base_model_class"))
    by_class = (task.name for task in TASKS.values() if trained_on.endswith(task.suffixes))
    return by_type.get(str(config.get("task_type"))) or next(by_class, None)


def describe(graph: Graph, method: type[Adapter], config: Mapping[str, Any]) -> Adapter:
    """The pass that a PEFT config describes, with targets that match what PEFT would match in this graph.

    Raises:
        UsageError: the config targets no module of the graph.
    """
    step = method.from_peft(config)
    saved = [name for name in config.get("modules_to_save") or [] if _exists(graph, name)]
    if method.peft_prompt:
        return dataclasses.replace(step, modules_to_save=",".join(saved))
    if config.get("target_modules") is None and not method.peft_bias:
        return step  # the method knows its place
    bias = {"none": "none", "all": "all", method.peft_bias: "sites"}.get(str(config.get("bias", "none")))
    if bias is None:
        raise UnsupportedError(f"bias = {config['bias']!r} is not supported", CONFIG, "none, all, " + method.peft_bias)
    step = dataclasses.replace(step, modules_to_save=",".join(saved), bias=bias)
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return dataclasses.replace(step, targets=ALL_LINEAR)
    wanted = targeted_sites(config, sites(graph, *method.kinds))
    if not wanted:
        what = f"the adapter targets no module of {graph.config.model_type}"
        raise UsageError(what, str(targets)[:200], "name its own base with --base")
    return _simple(graph, step, config, wanted) or dataclasses.replace(step, targets=_alternatives(wanted))


def _simple(graph: Graph, step: Adapter, config: Mapping[str, Any], wanted: list[str]) -> Adapter | None:
    """The config's own patterns in surgeon's notation, if they say the same."""
    excluded = config.get("exclude_modules")
    exclude = _pattern(excluded, None) if excluded else ""
    try:
        parameters = [f"*.{name}" for name in config.get("target_parameters") or []]
        named = _pattern(config.get("target_modules") or [], wanted)
        made = dataclasses.replace(step, targets=",".join(filter(None, [named, *parameters])), exclude=exclude)
        chosen, skipped = chosen_sites(graph, made)
    except SurgeonError:
        return None
    return made if not skipped and {site.path for site in chosen} == set(wanted) else None


def _pattern(names: Any, wanted: list[str] | None) -> str:
    if isinstance(names, str):
        return f"re:{names}"
    used = [n for n in sorted(names) if wanted is None or any(p == n or p.endswith(f".{n}") for p in wanted)]
    return ",".join(used)


def _alternatives(paths: list[str]) -> str:
    return "re:" + "|".join(re.escape(path) for path in paths)


def _exists(graph: Graph, name: str) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in replaced.module_paths(graph))


def _check_fields(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse, by name, whatever would change what the adapter computes and is not known here."""
    for name, value in config.items():
        switched_on = value is True or (isinstance(value, (str, list, dict)) and bool(value))
        if name not in _KNOWN and switched_on:
            raise UnsupportedError(
                f"the adapter uses {name} = {str(value)[:80]}, which is not supported", str(folder / CONFIG),
                "merge it with PEFT and use the merged model",
            )  # fmt: skip


def _base_path(name: str, folder: Path, given: bool) -> str:
    """A relative base is looked for from here, then from the adapter's folder."""
    if not given and not Path(name).is_dir() and (folder / name).is_dir():
        return str(folder / name)
    return name
