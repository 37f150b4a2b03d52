"""`surgeon adapter`: from folders to a file for an export, refused or proven before it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from surgeon import api
from surgeon.errors import SurgeonError, UsageError
from surgeon.graph import Graph
from surgeon.lower.onnx import adapter_file, adapter_stack
from surgeon.lower.onnx.adapter_forms import Array
from surgeon.lower.onnx.adapter_slots import compiled
from surgeon.lower.onnx.adapters import arrays, read
from surgeon.lower.onnx.check import Replay
from surgeon.lower.onnx.effective import adapted
from surgeon.lower.onnx.files import models
from surgeon.lower.onnx.precision import ACTIVATIONS, BITS
from surgeon.lower.onnx.proof import replayed
from surgeon.passes import parse
from surgeon.passes.base import Adapter
from surgeon.passes.intq import IntQ
from surgeon.verification import make_probes


@dataclass(frozen=True)
class Compiled:
    """An adapter's file, or two of an encoder-decoder's.

    Attributes:
        file: its name, which `surgeon.lower.onnx.adapter_file.load` takes.
        files: where it is.
        bytes: its size.
        slots: how many it fills.
        passes: the methods, as option strings.
        replays: what ONNX Runtime computed with each of its adapters; () if it was not asked.
    """

    file: Path
    files: tuple[Path, ...]
    bytes: int
    slots: int
    passes: tuple[str, ...]
    replays: tuple[Replay, ...]


def compile_file(
    folders: Sequence[str | Path],
    export: str | Path,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    verify: bool = True,
) -> Compiled:
    """Write the adapters of folders as one file for an export, or one for each of its two models.

    Args:
        folders: PEFT adapter folders or work folders; of a stacked export, numbers 1, 2, … of the stack.
        export: the folder of an export with slots.
        out: `x.onnx_adapter` or `x.safetensors`; by default the first folder's name, in the form the export's profile
            takes.
        base: the base, where the folders' own record of it no longer holds.
        rank: of adapters that have every rank.
        verify: replay 20 greedy tokens of each against torch; several that are side by side in one file are not.

    Raises:
        CheckFailed: ONNX Runtime computes something else with it; nothing is written.
        UnsupportedError: a part of it has no slot.
        UsageError: it is for another base, or two folders fill one slot.
    """
    record = adapter_file.read_export(export)
    suffix = adapter_file.NATIVE if record["slots"]["optional"] else adapter_file.PLAIN
    path = Path(out) if out is not None else Path(f"{Path(folders[0]).absolute().name}{suffix}")
    adapter_file.form(path)
    codes = tuple(record["base"]["codes"])
    graphs = [read(folder, base, rank, codes) for folder in folders]
    parts = [arrays(compiled(graph, record, str(folder))) for folder, graph in zip(folders, graphs, strict=True)]
    stack = record["slots"]["form"] == "stacked"
    tensors = adapter_stack.stacked(parts, record) if stack else _together(folders, parts)
    adapter_file.check(tensors, record, str(path))
    checked = []
    if verify and (stack or len(graphs) == 1):
        fed = adapter_file.as_loaded(tensors, record)
        for number, graph in enumerate(graphs, start=1):
            given = replace(fed, ids=(number,)) if stack else fed
            checked.append(_replayed(graph, Path(export), given, record))
            checked[-1].require(str(path))
    size = adapter_file.write(tensors, record, path)
    steps = [step.spec() for graph in graphs for step in graph.applied if isinstance(step, Adapter)]
    return Compiled(path, tuple(adapter_file.files(path, record)), size, len(tensors), tuple(steps), tuple(checked))


def _together(folders: Sequence[str | Path], parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """Adapters side by side: each slot is one's."""
    found: dict[str, Array] = {}
    owner: dict[str, str | Path] = {}
    for name, tensors in zip(folders, parts, strict=True):
        taken = next((slot for slot in tensors if slot in found), None)
        if taken is not None:
            what = f"two adapters claim the slot {taken}"
            hint = "compile them one by one, or train one over the other: a work folder with both is one adapter"
            raise UsageError(what, f"{owner[taken]} and {name}", hint)
        found.update(tensors)
        owner.update(dict.fromkeys(tensors, name))
    return found


def _replayed(graph: Graph, export: Path, given: adapter_file.Loaded, record: dict[str, Any]) -> Replay:
    """The export with an adapter in its slots, against torch; its base in the codes that the export has of it."""
    files = [export / name for name in models(record)]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise SurgeonError("the export has no model", str(missing), "export it again, or --no-verify")
    probes = make_probes(graph, api.tokenizer_of(export))
    step = parse(record["quantised"]["codes"]) if record.get("quantised", {}).get("codes") else None
    reference = adapted(graph, step if isinstance(step, IntQ) else None)
    relative = ACTIVATIONS if record["precision"] in BITS else None
    return replayed(reference, files, probes, getattr(torch, record["slots"]["dtype"]), relative, given)
