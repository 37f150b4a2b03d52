"""The binaries an artifact needs: its program runs on tensors without values, and every launch it makes is one.

Nothing is computed and no GPU is needed. The batches are chosen so that sizes that vary from call to call are odd in
one of them: what is a multiple of 16 in all of them is a size of the model, and is compiled in as such.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon import module
from surgeon.artifact import manifest as form
from surgeon.artifact.cache import Cache
from surgeon.artifact.operators import longest, on_gpu
from surgeon.artifact.program import Program
from surgeon.errors import CheckFailed
from surgeon.kernels.aot import Binary, Target, Variant, build, target
from surgeon.kernels.jit import Call, launcher
from surgeon.kernels.pages import plan

FALLBACK = "sm_80"
"""Its PTX runs on every later GPU."""
META = torch.device("meta")
DECODE, PREFILL = (1, 3, 19, 67), (2, 19, 35, 75, 131, 4117)
"""Requests in a step, and tokens of a prompt: on both sides of every number at which a kernel changes its tiles."""


@dataclass(frozen=True)
class _Kind:
    """What makes two launches need two binaries."""

    kernel: Any
    constants: tuple[tuple[str, Any], ...]
    signature: str
    warps: int
    stages: int


def launches(program: Program, dtypes: dict[str, torch.dtype]) -> list[Variant]:
    """What has to be compiled.

    Args:
        program: of the artifact.
        dtypes: of its tensors.
    """
    seen: dict[_Kind, set[str]] = {}

    def record(call: Call) -> None:
        constants = tuple((name, call.constants[name]) for name in call.constants)
        kind = _Kind(call.kernel, constants, " ".join(call.types.values()), call.warps, call.stages)
        whole = {name for name, value in call.arguments.items() if type(value) is int and value % 16 == 0}
        seen[kind] = seen.get(kind, whole) & whole

    graph = on_gpu(program.graph)
    graph.inserted = {}
    graph.values = {name: torch.empty(s.shape, dtype=dtypes[name], device=META) for name, s in graph.tensors.items()}
    graph.tensors = {name: dataclasses.replace(s, dtype=dtypes[name]) for name, s in graph.tensors.items()}
    loaded = module.load(graph, device=META)
    with torch.inference_mode(), launcher(record):
        for requests, tokens in [*((count, 1) for count in DECODE), *((1, count) for count in PREFILL)]:
            _run(program, loaded, requests, tokens)
    return [_variant(kind, whole) for kind, whole in seen.items()]


def _run(program: Program, loaded: module.GraphModule, requests: int, tokens: int) -> None:
    cache = Cache(loaded, program, requests, tokens + 1)
    tiles = [longest(tokens, one.heads, one.kv, cache.dtype) for one in program.attentions]
    segments = plan([(tokens, 0)] * requests, tile=min(tiles, default=1)).to(META)
    ids = torch.empty(requests, tokens, dtype=torch.int64, device=META)
    given = {"input_ids": ids, "position_ids": ids, "segments": segments, "slots": ids.flatten()}
    loaded(*(given[name] for name in program.graph.inputs))


def _variant(kind: _Kind, whole: set[str]) -> Variant:
    text = repr((kind.constants, kind.signature, kind.warps, kind.stages))
    label = hashlib.sha256(text.encode()).hexdigest()[:10]
    return Variant(kind.kernel, label, kind.signature, dict(kind.constants), kind.warps, kind.stages, frozenset(whole))


def compiled(variants: Sequence[Variant], archs: Sequence[str]) -> list[Binary]:
    """Every variant for every architecture.

    A binary that spills registers is slow and right: for the shapes of a user's model it is kept, and the manifest says
    so (`spilled`). The kernels' own variants, which tests compile, may not spill.

    Raises:
        CheckFailed: a binary cannot be launched; see `surgeon.kernels.aot.build`.
    """
    return [_built(variant, target(arch)) for arch in archs for variant in variants]


def _built(variant: Variant, where: Target) -> Binary:
    try:
        return build(variant, where)
    except CheckFailed:
        made = build(variant, where, check=False)
        if not made.spilled:
            raise
        return made


def written(folder: Path, binaries: Sequence[Binary]) -> list[dict[str, Any]]:
    """Write binaries into an artifact, those of `FALLBACK` with their PTX; what the manifest says of them."""
    records = []
    for one in binaries:
        place = folder / form.KERNELS / one.target.name
        place.mkdir(parents=True, exist_ok=True)
        stem = f"{form.KERNELS}/{one.target.name}/{one.variant.name}"
        record = {**one.record(), "file": f"{stem}.{one.target.binary}"}
        (folder / record["file"]).write_bytes(one.code)
        if one.target.name == FALLBACK:
            text = one.text.encode()
            record |= {"ptx": f"{stem}.{one.target.text}", "ptx_sha256": form.digest(text)}
            (folder / record["ptx"]).write_bytes(text)
        records.append(record)
    return records
