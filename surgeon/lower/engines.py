"""Adapters for vLLM and SGLang: a PEFT LoRA folder that passes what the engine checks, and the flags it needs.

Both read PEFT's LoRA and nothing else: DoRA, saved modules and biases are rejected, other methods are unknown. What has
exact factors (AdaLoRA, VeRA, DyLoRA at a rank, LoHa, stacks of these) is written as the LoRA it is; the rest is refused
here, before the engine would, with the way that works: a merged checkpoint.

Sources: vllm/lora/peft_helper.py and vllm/config/lora.py (max_lora_rank), sglang/srt/lora (docs, LoRA serving).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon import api, convert, peft_files, peft_load
from surgeon.atomic import atomic_folder
from surgeon.errors import CheckFailed, UnsupportedError
from surgeon.fold import folds
from surgeon.graph import Graph
from surgeon.passes.base import Adapter
from surgeon.ranks import at_rank
from surgeon.run import owners
from surgeon.sites import LINEAR
from surgeon.verification import compare, make_probes

if TYPE_CHECKING:
    from surgeon.model import SurgeonModel

RANKS = {"vllm": (1, 8, 16, 32, 64, 128, 256, 320, 512), "sglang": tuple(range(1, 513))}
"""Values that each engine's --max-lora-rank takes."""
_MERGE = "surgeon export --target hf: every engine loads the merged checkpoint"


@dataclass(frozen=True)
class EngineReport:
    """An adapter folder and how to serve it.

    Attributes:
        engine: "vllm" or "sglang".
        folder: what was written.
        method: what it was made of.
        rank: the highest of its ranks.
        modules: last names of the modules it changes.
        command: the command that serves it.
        max_error: largest difference of the outputs on probes, against the adapter it was made of.
    """

    engine: str
    folder: str
    method: str
    rank: int
    modules: tuple[str, ...]
    command: str
    max_error: float


def export_for(
    engine: str,
    work: str | Path | SurgeonModel,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> EngineReport:
    """Write the adapter of a folder as the LoRA an engine reads.

    Args:
        engine: "vllm" or "sglang".
        work: a work folder, a PEFT adapter folder, or a loaded model.
        out: the new folder.
        base: the base, where the folder's own record of it no longer holds.
        rank: of adapters that have every rank (DyLoRA).
        overwrite: replace the folder if it exists.
        verify: read it back and compare outputs before it gets its name.

    Raises:
        UnsupportedError: the engine would reject it, or serve only a part of it; the part is named.
        CheckFailed: what was written computes something else.
    """
    graph = api.to_merge(work, base)
    graph = graph if rank is None else at_rank(graph, rank)
    method = " + ".join(step.name for step in graph.applied if isinstance(step, Adapter))
    made = convert.to_lora(graph).graph
    highest = preflight(engine, made)
    owner, step = next((o, s) for o, s in owners(made.applied).items() if isinstance(s, Adapter))
    error = 0.0
    with atomic_folder(out, overwrite=overwrite) as new:
        peft_files.write_adapter(made, owner, step, new)
        if verify:
            again = peft_load.load_adapter(new, base or graph.source, graph.task)
            found = compare(graph, again, probes=make_probes(graph, api.tokenizer_of(graph.source)))
            if not found.ok:
                what = f"the folder computes something else: {found.max_error:.3g} over {found.bound:.3g}"
                raise CheckFailed(what, str(out), "report this with the output of surgeon show")
            error = found.max_error
    modules = tuple(sorted({item.site.path.rpartition(".")[2] for item in folds(made)}))
    command = _command(engine, graph.source, Path(out), highest, modules)
    return EngineReport(engine, str(out), method, highest, modules, command, error)


def preflight(engine: str, graph: Graph) -> int:
    """The highest rank of a graph's LoRA, if an engine takes it whole.

    Raises:
        UnsupportedError: it does not; the first reason is named.
    """
    items = folds(graph)
    odd = [item.site for item in items if item.site.kind != LINEAR]
    if odd:
        what = f"{engine} would leave out {odd[0].path}, which is no linear but {odd[0].kind}"
        raise UnsupportedError(what, f"{len(odd)} places", _MERGE)
    ends = [item.site for item in items if item.site.layer == ""]
    if ends:
        raise UnsupportedError(f"{engine} adapts layers, and {ends[0].path} is in none", "--target", _MERGE)
    highest = max(int(item.tensors()["a"].shape[0]) for item in items)
    if highest > max(RANKS[engine]):
        what = f"the adapter has rank {highest}, and {engine} takes at most {max(RANKS[engine])}"
        raise UnsupportedError(what, graph.source, f"surgeon convert --rank, or {_MERGE}")
    return highest


def _command(engine: str, base: str, out: Path, rank: int, modules: tuple[str, ...]) -> str:
    """The command that serves the adapter, with the flags it cannot do without."""
    most = str(next(allowed for allowed in RANKS[engine] if allowed >= rank))
    adapter = f"{out.name}={out.absolute()}"
    if engine == "vllm":
        words = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", most, "--lora-modules", adapter]
    else:
        words = ["python", "-m", "sglang.launch_server", "--model-path", base, "--enable-lora", "--lora-paths", adapter]
        words += ["--max-lora-rank", most, "--lora-target-modules", *modules]
    return shlex.join(words)
