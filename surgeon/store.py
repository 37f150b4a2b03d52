"""Work folders: a rewritten graph on disk. The base is named, not copied; adapters are in PEFT's format.

A save writes a whole new folder beside the old one, links into it what others keep there (training checkpoints, the
loss log), and swaps the two in one step: a kill leaves the old state or the new one, never a mixture.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from surgeon import card, kept_codes, manifest, passes, peft_files, peft_load, peft_parts, replaced, run, text
from surgeon.atomic import atomic_folder
from surgeon.errors import SurgeonError, UsageError
from surgeon.graph import Graph
from surgeon.manifest import Manifest, Step
from surgeon.passes.base import Adapter, Pass
from surgeon.passes.quantiser import Quantiser
from surgeon.peft_values import put
from surgeon.source import open_graph, open_source

TEXT, OWN_WEIGHTS = "graph.txt", "surgeon.safetensors"
REST = "adapter"
"""The folder in a merged checkpoint with what did not fold."""
_OURS = (manifest.FILE, TEXT, card.FILE, peft_files.CONFIG, peft_files.WEIGHTS, OWN_WEIGHTS, kept_codes.FILE)
load_adapter = peft_load.load_adapter


def is_work_folder(folder: str | Path) -> bool:
    """Whether a folder was saved by surgeon."""
    return (Path(folder) / manifest.FILE).is_file()


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a folder is a PEFT adapter."""
    return (Path(folder) / peft_files.CONFIG).is_file()


def has_rest(folder: str | Path) -> bool:
    """Whether a folder is a merged checkpoint that adapters lie beside."""
    return is_work_folder(Path(folder) / REST)


def save(
    graph: Graph,
    folder: str | Path,
    *,
    overwrite: bool = False,
    seed: int | None = None,
    probes: Sequence[Mapping[str, Any]] = (),
    base: Path | None = None,
) -> Path:
    """Write a work folder.

    Args:
        graph: an adapted graph, with its trained values in `inserted`.
        folder: where; an existing work folder is replaced with `overwrite`, and files of others in it stay.
        overwrite: allow that.
        seed: the seed the passes were applied with; None for that of the folder that is replaced, else 0.
        probes: `{"prompt": ids, "tokens": greedy continuation}` each, to be replayed by whoever loads it.
        base: the name the base will have, where it still has a temporary one.

    Raises:
        UsageError: nothing is applied, the graph has no base folder, or `folder` is taken.
        CheckFailed: a trained value is not finite; nothing is written.
        SurgeonError: the disk is full.
    """
    folder = Path(folder)
    if not graph.applied:
        raise UsageError("there is nothing to save: no method is applied", str(folder), "apply one: surgeon apply")
    if not graph.source:
        raise UsageError("the graph has no base on disk", str(folder), "save_pretrained the model, and open that")
    old = _previous(folder, overwrite)
    seed = seed if seed is not None else (old.seed if old is not None else 0)
    steps = _steps(graph)
    described = manifest.describe_base(graph.source, folder, graph.config.model_type)
    if base is not None:
        graph = dataclasses.replace(graph, source=str(base))
        described["path"] = str(base.absolute())
    written = text.render(graph)
    record = Manifest(
        manifest.SCHEMA, described, graph.task, tuple(steps), text.digest(graph), seed, manifest.versions(),
        tuple(probes), graph.labels, graph.context,
    )  # fmt: skip
    with atomic_folder(folder, overwrite=overwrite) as new:
        if old is not None:
            _carry(folder, new, {*_OURS, *(step.folder for step in (*old.passes, *steps))})
        for step, applied in zip(steps, graph.applied, strict=True):
            _write_step(graph, step, applied, new, _parts(graph, steps, step))
        (new / TEXT).write_text(written, encoding="utf-8")
        (new / card.FILE).write_text(card.render(graph, record), encoding="utf-8")
        record.write(new)
    return folder


def load(folder: str | Path, base: str | Path | None = None) -> Graph:
    """The graph of a work folder, with values.

    Args:
        folder: the work folder.
        base: where the base is, if it has moved.

    Raises:
        UsageError: the folder is damaged or incomplete, or the base is missing or another one.
        UnsupportedError: it was written by a newer surgeon.
        SurgeonError: the graph comes out different from the one that was saved; the difference is shown.
    """
    folder = Path(folder)
    record = manifest.read_manifest(folder)
    place = manifest.find_base(record, folder, base)
    source = open_source(place, record.task, labels=record.labels, context=record.context)
    return adapt(open_graph(source, seed=record.seed), record, folder)


def adapt(graph: Graph, record: Manifest, folder: Path) -> Graph:
    """The graph of a work folder's base, opened already, with what the folder applied; raises as `load` does."""
    steps = [_pass(step, folder) for step in record.passes]
    graph = run.apply(graph, *steps[len(graph.applied) :], seed=record.seed)
    _check_same(graph, record, folder)
    fill(graph, record, folder)
    return graph


def fill(graph: Graph, record: Manifest, folder: Path) -> None:
    """The tensors of a work folder into a graph that has its passes; raises UsageError for what does not fit."""
    for step, applied in zip(record.passes, graph.applied, strict=True):
        _read_step(graph, step, applied, folder, _parts(graph, record.passes, step))


def _previous(folder: Path, overwrite: bool) -> Manifest | None:
    """The record of the work folder to be replaced; raises UsageError for a folder that is none."""
    if not overwrite or not folder.is_dir():
        return None
    if is_work_folder(folder):
        return manifest.read_manifest(folder)
    foreign = [entry.name for entry in folder.iterdir() if not _unfinished(entry.name)]
    if foreign:
        what = f"the folder is no work folder: it holds {foreign[0]} and no {manifest.FILE}"
        raise UsageError(what, str(folder), "name another folder")
    return None


def _steps(graph: Graph) -> list[Step]:
    owners = run.owners(graph.applied)
    stored = {spec.owner for spec in graph.tensors.values()}
    formats = {
        owner: "peft" if isinstance(step, Adapter) and not peft_files.unfit(graph, owner, step) else "surgeon"
        for owner, step in owners.items()
        if owner in stored and not step.derived
    }
    parts = peft_parts.hosts(owners, [owner for owner, kind in formats.items() if kind == "peft"])
    apart = [owner for owner in formats if owner not in parts]
    folders = manifest.step_folders(apart) if apart else {}
    return [
        Step(owner, step.name, step.options(), folders.get(parts.get(owner, owner), ""), formats.get(owner, ""))
        for owner, step in owners.items()
    ]


def _parts(graph: Graph, steps: Sequence[Step], host: Step) -> dict[str, Adapter] | None:
    """The passes whose tensors are in the file of another one, by id; None for one of them."""
    sharing = [(s, a) for s, a in zip(steps, graph.applied, strict=True) if s.format and s.folder == host.folder]
    if not sharing or sharing[0][0].id != host.id:
        return None if host.format else {}
    return {s.id: a for s, a in sharing[1:] if isinstance(a, Adapter)}


def _write_step(graph: Graph, step: Step, applied: Pass, folder: Path, parts: dict[str, Adapter] | None) -> None:
    place = folder / step.folder
    if parts is None:
        return
    if isinstance(applied, Quantiser):
        if step.format:
            place.mkdir(exist_ok=True)
            kept_codes.write(graph, step.id, place / kept_codes.FILE)
        return
    if step.format == "peft" and isinstance(applied, Adapter):
        peft_files.write_adapter(graph, step.id, applied, place, parts)
    if step.format == "surgeon" or (step.format and _lossy(applied)):
        place.mkdir(exist_ok=True)
        tensors = {name: graph.inserted[name]() for name in _own(graph, step.id, applied)}
        peft_files.write_tensors(place / OWN_WEIGHTS, tensors)


def _read_step(graph: Graph, step: Step, applied: Pass, folder: Path, parts: dict[str, Adapter] | None) -> None:
    place = folder / step.folder
    stored = {}
    if parts is None:
        return
    if isinstance(applied, Quantiser):
        if step.format:
            kept_codes.read(graph, step.id, place / kept_codes.FILE)
        return
    if step.format == "peft" and isinstance(applied, Adapter):
        peft_files.read_config(place)
        stored = peft_files.read_tensors(place / peft_files.WEIGHTS)
        if not _lossy(applied):
            peft_files.fill(graph, step.id, applied, stored, place / peft_files.WEIGHTS, parts)
    if step.format == "surgeon" or (step.format and _lossy(applied)):
        _read_own(graph, step.id, applied, place / OWN_WEIGHTS)
    if stored and _lossy(applied):
        peft_files.check(graph, step.id, stored, place / peft_files.WEIGHTS)


def _read_own(graph: Graph, owner: str, applied: Pass, file: Path) -> None:
    tensors = peft_files.read_tensors(file)
    names = _own(graph, owner, applied)
    if names != sorted(tensors):
        odd = sorted(set(names) ^ set(tensors))
        raise UsageError(f"missing or unexpected tensor: {', '.join(odd[:3])}", str(file), manifest.AGAIN)
    for name in names:
        put(graph, name, tensors[name], name, file)


def _own(graph: Graph, owner: str, applied: Pass) -> list[str]:
    """What a pass inserted, and what trains with it."""
    own = {n for n, s in graph.tensors.items() if s.owner == owner and (s.dtype is None or s.dtype.is_floating_point)}
    return sorted(own | set(replaced.names(graph, owner, applied) if isinstance(applied, Adapter) else ()))


def _lossy(applied: Pass) -> bool:
    return isinstance(applied, Adapter) and applied.peft_lossy


def _pass(step: Step, folder: Path) -> Pass:
    try:
        return passes.make(step.name, **step.options)
    except UsageError as error:
        where = f"{folder / manifest.FILE}, pass {step.id}"
        raise UsageError(error.what, where, f"it was saved by another version of surgeon ({error.hint})") from error


def _check_same(graph: Graph, record: Manifest, folder: Path) -> None:
    if text.digest(graph) == record.graph:
        return
    import difflib

    file = folder / TEXT
    saved = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    lines = difflib.unified_diff(saved, text.render(graph).splitlines(), "saved", "now", lineterm="", n=0)
    changed = list(islice((line for line in lines if not line.startswith(("---", "+++", "@@"))), 6))
    saved_with = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    raise SurgeonError(
        "the graph comes out different from the one that was saved:\n    "
        + "\n    ".join(line[:160] for line in changed or ["(no graph.txt to compare with)"]),
        str(folder), f"it was saved with {saved_with}: install those versions, or train again",
    )  # fmt: skip


def _carry(old: Path, new: Path, ours: set[str]) -> None:
    """Link what is not ours from the old folder into the new one; it is copied only where links do not work."""
    for entry in old.iterdir():
        if entry.name in ours or _unfinished(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(new / entry.name), follow_symlinks=False)


def _link(source: str, target: str, follow_symlinks: bool = True) -> str:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
    return target


def _unfinished(name: str) -> bool:
    """Whether a killed command left this entry behind; see `surgeon.atomic` and `surgeon.trainer`."""
    return re.fullmatch(r"\..+\.((tmp|old)-\d+-[0-9a-f]+|removed)", name) is not None
