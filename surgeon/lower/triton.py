"""`--target triton`: a model as a folder of binaries, weights and a program, replayed before it is kept.

Adapters are folded into the weights; over a base in codes, where that would lose the base's bits, or on request, they
stay beside it. Virtual tokens become columns in the first pages of every request.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from surgeon import fold, module, positions, run
from surgeon.artifact import manifest as form
from surgeon.artifact.program import Program, to_json
from surgeon.artifact.runtime import Replay, open_artifact
from surgeon.atomic import atomic_folder, check_target
from surgeon.errors import CheckFailed, UnsupportedError, UsageError, nearest
from surgeon.finalise import finalise
from surgeon.generate import Generator, generator
from surgeon.graph import Graph
from surgeon.hold import holders
from surgeon.kernels.aot import target
from surgeon.lower.launches import FALLBACK, compiled, launches, written
from surgeon.lower.paging import paged
from surgeon.lower.virtual_columns import as_columns
from surgeon.manifest import versions
from surgeon.strip import without
from surgeon.verification import RELATIVE, make_probes

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STEPS = 16


@dataclass(frozen=True)
class TritonReport:
    """An export.

    Attributes:
        folder: where it is.
        files: what was written, with sizes in bytes.
        precision: of weights, cache and arithmetic.
        archs: the architectures there are binaries for.
        binaries: how many there are.
        adapter: whether an adapter stays beside the base.
        replay: what the reference of every operator said to the probes, None if it was not asked.
        seconds: time taken.
    """

    folder: Path
    files: dict[str, int]
    precision: str
    archs: tuple[str, ...]
    binaries: int
    adapter: bool
    replay: Replay | None
    seconds: float


def export_triton(
    graph: Graph,
    out: str | Path,
    *,
    arch: Sequence[str] = ("sm_80", "sm_90"),
    precision: str = "",
    keep_adapter: bool | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    verify: bool = True,
) -> TritonReport:
    """Write the folder `out`.

    Args:
        graph: a causal language model with values.
        out: the new folder.
        arch: NVIDIA architectures; sm_80 always comes with them, as the PTX that runs everywhere.
        precision: "fp32", "fp16" or "bf16", the base's own if not given.
        keep_adapter: whether a low-rank adapter stays beside the base; None keeps it over a base in codes.
        tokenizer: is written beside the model and makes the probes.
        overwrite: replace an existing folder.
        verify: replay the probes through the reference of every operator.

    Raises:
        CheckFailed: the artifact says something else than the model; nothing is left behind.
        UnsupportedError: the model has no form over pages, or Triton is not installed.
        UsageError: no such precision or architecture, or `out` exists.
    """
    began = time.perf_counter()
    archs = _archs(arch)
    dtype = _dtype(graph, precision)
    check_target(Path(out), overwrite)
    keep = bool(holders(graph)) if keep_adapter is None else keep_adapter
    program = paged(final(graph, keep))
    dtypes = _dtypes(program.graph, dtype)
    variants = launches(program, dtypes)
    model = generator(module.load(graph, dtype=dtype))
    probes, tolerance = _probes(model, graph, tokenizer, dtype)
    with atomic_folder(out, overwrite=overwrite) as folder:
        records = written(folder, compiled(variants, archs))
        _write_program(folder, program)
        tensors = {name: _value(program.graph, name, kind) for name, kind in dtypes.items()}
        save_file(tensors, folder / form.WEIGHTS)
        del tensors
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            (folder / form.TOKENIZER).write_text(backend.to_str(), encoding="utf-8")
        form.Manifest(
            form.SCHEMA, str(dtype).removeprefix("torch."), archs, records,
            form.digest((folder / form.PROGRAM).read_bytes()), (folder / form.WEIGHTS).stat().st_size, probes,
            tolerance, _stop(model), _room(program), graph.config.model_type,
            [{"name": step.name, "options": step.options()} for step in graph.applied], versions(),
        ).write(folder)  # fmt: skip
        replay = _replayed(folder, str(out)) if verify else None
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    adapter = any("low_rank" in str(node.target) for _, node in program.graph.nodes())
    taken = time.perf_counter() - began
    name = next(key for key, value in PRECISIONS.items() if value == dtype)
    return TritonReport(Path(out), files, name, tuple(archs), len(records), adapter, replay, taken)


def final(graph: Graph, keep: bool) -> Graph:
    """The graph as it is deployed: adapters folded in, or without what only training needs; prompts as columns."""
    if keep:
        training = {owner for owner, step in run.owners(graph.applied).items() if step.training_only}
        plain = without(graph, training) if training else graph
    else:
        plain = finalise(graph)
    return as_columns(plain) if fold.rows(plain) else plain


def _archs(arch: Sequence[str]) -> list[str]:
    named = [one.strip() for one in arch if one.strip()]
    found = [target(one) for one in named]
    other = [one.name for one in found if one.backend != "cuda"]
    if other:
        what = f"the artifact runs on NVIDIA GPUs; {', '.join(other)} is none"
        raise UnsupportedError(what, "--arch", "sm_80, sm_86, sm_89, sm_90 or sm_100")
    old = [one.name for one in found if int(one.arch) < 80]
    if old:
        raise UnsupportedError(f"{', '.join(old)} has no bf16 tensor cores", "--arch", "sm_80 and later")
    return list(dict.fromkeys([FALLBACK, *named]))


def _dtype(graph: Graph, precision: str) -> torch.dtype:
    if precision and precision not in PRECISIONS:
        raise UsageError(f"no precision {precision}", "--precision", f"did you mean {nearest(precision, PRECISIONS)}?")
    if precision:
        return PRECISIONS[precision]
    stored = (graph.values[n].dtype for n, s in graph.tensors.items() if not s.owner and s.parameter)
    return next((dtype for dtype in stored if dtype in PRECISIONS.values()), torch.float32)


def _dtypes(graph: Graph, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What every tensor is written in: codes and what decodes them as they are."""
    parts = {part for spec in graph.tensors.values() if spec.held for part in spec.held.parts.values()}
    found = {}
    for name, spec in graph.tensors.items():
        if spec.held is not None:
            continue
        own = spec.dtype
        if own is None:
            stored = graph.inserted[name]().dtype if name in graph.inserted else graph.values[name].dtype
            own = dtype if stored.is_floating_point and name not in parts else stored
        found[name] = own
    return found


def _value(graph: Graph, name: str, dtype: torch.dtype) -> torch.Tensor:
    value = module.read_tensor(graph, name, None, torch.device("cpu"))
    return value.detach().to(dtype).contiguous().clone()


def _write_program(folder: Path, program: Program) -> None:
    text = json.dumps(to_json(program), separators=(",", ":"), allow_nan=False)
    (folder / form.PROGRAM).write_text(text + "\n", encoding="utf-8")


def _probes(model: Generator, graph: Graph, tokenizer: Any, dtype: torch.dtype) -> tuple[list[form.Probe], float]:
    """What the model says before it is lowered, in the artifact's precision; which margins are within its rounding."""
    room = positions.limit(graph) or 10**9
    probes, largest = [], 0.0
    for probe in make_probes(graph, tokenizer):
        steps = max(1, min(STEPS, room - len(probe.ids) - 1))
        given = torch.tensor([probe.ids])
        found = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
            output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        best = [logits[0].float().topk(2).values for logits in found.logits]
        tokens = found.sequences[0, len(probe.ids) :].tolist()
        probes.append(form.Probe(list(probe.ids), tokens, [float(a - b) for a, b in best]))
        largest = max([largest, *(float(one[0].abs()) for one in best)])
    return probes, 2 * RELATIVE[dtype] * largest


def _stop(model: Generator) -> list[int]:
    config = model.generation_config.eos_token_id
    return [int(one) for one in (config if isinstance(config, list) else [config]) if one is not None]


def _room(program: Program) -> int:
    """Positions of a table of them, 0 where they are computed."""
    found = positions.room(program.graph)
    return 0 if found is None else found[1] - program.first


def _replayed(folder: Path, where: str) -> Replay:
    found = open_artifact(folder, "cpu").replay()
    if not found.ok:
        what = f"the artifact generates other tokens than the model: {found.agreement:.1%} agree"
        raise CheckFailed(what, where, "nothing was written; --precision fp32 is more precise")
    return found


def summary(report: TritonReport) -> dict[str, Any]:
    """What `surgeon export` prints."""
    replay = report.replay
    return {
        "folder": report.folder,
        "precision": report.precision,
        "archs": report.archs,
        "binaries": report.binaries,
        "bytes": sum(report.files.values()),
        "adapter": "beside the base" if report.adapter else "folded in, or none",
        "token_agreement": replay.agreement if replay else None,
        "tokens": replay.tokens if replay else 0,
        "seconds": round(report.seconds, 1),
    }
