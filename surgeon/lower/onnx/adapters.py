"""`--adapters slots`: an export whose adapters stay apart from it: its inputs, its manifest, the proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from surgeon import api, peft_files, peft_load, run, store
from surgeon.errors import SurgeonError, UnsupportedError, UsageError, nearest
from surgeon.graph import Graph, val
from surgeon.lower.onnx import adapter_file, adapter_stack, once, slots
from surgeon.lower.onnx.adapter_file import Loaded
from surgeon.lower.onnx.adapter_forms import Array
from surgeon.lower.onnx.adapter_slots import Tensors, compiled, described
from surgeon.lower.onnx.check import Replay
from surgeon.lower.onnx.profiles import STANDARD, Profile
from surgeon.lower.onnx.slots import Slots
from surgeon.passes import parse
from surgeon.passes.base import Adapter
from surgeon.passes.quantiser import Quantiser
from surgeon.ranks import at_rank
from surgeon.sites import ATTENTION, sites
from surgeon.source import open_graph, open_source
from surgeon.wiring import inputs_of

MERGE, SLOTTED, STACKED = "merge", "slots", "stacked"
FORMS = (MERGE, SLOTTED, STACKED)
FOLDER = "adapters"
Check = Callable[[Graph, Loaded], Replay | None]


def check_form(form: str) -> None:
    """Raise UsageError for no such form."""
    if form not in FORMS:
        raise UsageError(f"no form of adapters {form}", "--adapters", f"did you mean {nearest(form, FORMS)}?")


def slotted(plain: Graph, profile: Profile, targets: str, form: str = SLOTTED) -> Graph:
    """A base with slots.

    Args:
        plain: the base as it is exported, before it has a cache.
        profile: what it is made for; a GroupQueryAttention has no prefix, and models without a cache of their own past
            have none of those.
        targets: the linears, see `surgeon.select`.
        form: "slots" or "stacked", whose attentions have no prefix.

    Raises:
        UnsupportedError: it is to be stacked, and is no model that generates.
    """
    stacked = form == STACKED
    if stacked and plain.task in once.TASKS:
        what = f"stacked adapters are for models that generate; {plain.config.model_type} is read for {plain.task}"
        raise UnsupportedError(what, plain.source, "--adapters slots: one adapter for all rows of a batch")
    prefix = profile.prefix_slots or profile.attention == STANDARD or plain.task != "causal-lm"
    prefix = prefix and bool(sites(plain, ATTENTION)) and not stacked
    return run.apply(plain, Slots(targets=targets, prefix=prefix, stacked=stacked))


def manifest(parts: Mapping[str, Graph], base: Graph, profile: Profile, dtype: torch.dtype) -> dict[str, Any]:
    """The `base` and `slots` of an export's manifest.

    Args:
        parts: with slots and with a cache, as they are lowered, by the names of their files.
        base: what adapters are made for, whatever its weights are in the export: one file fits all precisions.
        profile: what it is made for.
        dtype: of the slots.
    """
    inputs: dict[str, list[int | str]] = {}
    cached: dict[str, list[int | str]] = {}
    for graph in parts.values():
        for name, node in zip(graph.inputs, inputs_of(graph.trunk), strict=True):
            if adapter_file.is_slot(name):
                inputs[name] = list(slots.shape_of(name, val(node)))
            elif "past_key" in name:
                _, heads, _, size = val(node).shape
                cached[name] = [1, int(heads), "prefix_length", int(size)]
    step = next(step for graph in parts.values() for step in graph.applied if isinstance(step, Slots))
    preloaded = not step.prefix and not step.stacked and len(parts) == 1
    preloaded = preloaded and len(cached) == 2 * len(sites(base, ATTENTION))
    record: dict[str, Any] = {
        "form": STACKED if step.stacked else SLOTTED,
        "optional": profile.optional_slots,
        "dtype": str(dtype).removeprefix("torch."),
        "targets": step.targets,
        "prefix": "slots" if step.prefix else "initial" if preloaded else "none",
        "inputs": inputs,
        "initial": cached if preloaded else {},
    }
    if len(parts) > 1:
        record["parts"] = {part: slots.named(graph) for part, graph in parts.items() if slots.named(graph)}
    made = {"base": described(base), "slots": record}
    record["model_version"] = adapter_file.model_version(made)
    return made


def read(folder: str | Path, base: str | Path | None, rank: int | None = None, codes: tuple[str, ...] = ()) -> Graph:
    """The graph of an adapter's folder.

    Args:
        folder: a PEFT adapter folder or a work folder.
        base: its base, where its own record of it does not hold.
        rank: of adapters that have every rank; their highest if not given.
        codes: how the base is quantised that a PEFT adapter is for, as option strings.

    Raises:
        UsageError: there is no adapter, or its base is not there or another one.
    """
    if not store.is_work_folder(folder) and not store.is_adapter_folder(folder):
        hint = "name a PEFT adapter folder or a work folder"
        raise UsageError("the folder has no adapter", str(folder), hint)
    if codes and not store.is_work_folder(folder):
        folder = Path(folder)
        config, tensors = peft_files.read_config(folder), peft_files.read_tensors(folder / peft_files.WEIGHTS)
        place = base or str(config.get("base_model_name_or_path"))
        plain = run.apply(open_graph(open_source(place)), *(parse(text) for text in codes))
        graph = peft_load.adapt(plain, folder, config, tensors)
        return graph if rank is None else at_rank(graph, rank)
    return api.read(folder, base=base, rank=rank)


def read_all(folders: Sequence[str | Path], graph: Graph) -> dict[str, Graph]:
    """The adapters of folders for the base of a graph, by the folders' names.

    Raises:
        UsageError: two folders have one name, or one is no adapter of this base.
    """
    codes = tuple(step.spec() for step in graph.applied if isinstance(step, Quantiser))
    found: dict[str, Graph] = {}
    for folder in folders:
        name = Path(folder).absolute().name
        if name in found:
            raise UsageError(f"two adapters are named {name}", str(folder), "rename one of the folders")
        found[name] = read(folder, graph.source if codes else None, codes=codes)
    return found


def own(graph: Graph) -> dict[str, Graph]:
    """The adapters that a graph to be exported has itself, under a name."""
    return {"work": graph} if any(isinstance(step, Adapter) for step in graph.applied) else {}


def put(given: Mapping[str, Graph], record: Mapping[str, Any], folder: Path, check: Check) -> list[dict[str, Any]]:
    """Compile adapters into an export's folder, and prove each; what the manifest says of them.

    Raises:
        CheckFailed: one computes something else in ONNX Runtime.
        SurgeonError: one has no place in the slots.
    """
    suffix = adapter_file.NATIVE if record["slots"]["optional"] else adapter_file.PLAIN
    found = []
    for name, graph in given.items():
        tensors = arrays(compiled(graph, record, name))
        stack = record["slots"]["form"] == STACKED
        tensors = adapter_stack.stacked([tensors], record) if stack else tensors
        (folder / FOLDER).mkdir(exist_ok=True)
        file = folder / FOLDER / f"{name}{suffix}"
        size = adapter_file.write(tensors, record, file)
        fed = adapter_file.as_loaded(tensors, record)
        replay = check(graph, dataclasses.replace(fed, ids=(1,)) if stack else fed)
        if replay is not None:
            _require(replay, name)
        passes = [step.spec() for step in graph.applied if isinstance(step, Adapter)]
        verified = None if replay is None else asdict(replay)
        found.append(
            {"name": name, "file": f"{FOLDER}/{file.name}", "bytes": size, "passes": passes, "verified": verified}
        )
    return found


def _require(replay: Replay, name: str) -> None:
    try:
        replay.require(f"adapter {name}")
    except SurgeonError as error:
        raise type(error)(f"{error.what}, with the adapter {name}", error.where, error.hint) from error


def arrays(tensors: Tensors) -> dict[str, Array]:
    """The same in numpy."""
    return {name: value.numpy() for name, value in tensors.items()}
