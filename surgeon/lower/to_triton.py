"""`--target triton`: from what users name to `surgeon.lower.triton`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon import api
from surgeon.errors import UnsupportedError
from surgeon.kernels.jit import missing
from surgeon.lower.triton import TritonReport, export_triton
from surgeon.model import SurgeonModel
from surgeon.ranks import at_rank

if TYPE_CHECKING:
    from surgeon.graph import Graph


def export(
    work: str | Path | SurgeonModel,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    **options: Any,
) -> TritonReport:
    """Export a folder or a loaded model; options are those of `export_triton`.

    Args:
        work: a work folder, a PEFT adapter folder, a plain checkpoint, or a loaded model.
        out: the new folder.
        base: the base of an adapter, where the folder's own record of it no longer holds.
        rank: of adapters that have every rank (DyLoRA); their highest if not given.
        options: see `surgeon.lower.triton.export_triton`.

    Raises:
        UnsupportedError: Triton, which compiles the kernels, is not installed.
    """
    why = missing()
    if why:
        raise UnsupportedError(why, "--target triton", "pip install 'model-surgeon[triton]' (Linux); no GPU is needed")
    graph: Graph
    if isinstance(work, SurgeonModel):
        graph, tokenizer = work.trained(), work.tokenizer
    else:
        graph = api.read(work, base=base)
        tokenizer = api.tokenizer_of(work) or api.tokenizer_of(graph.source)
    graph = graph if rank is None else at_rank(graph, rank)
    return export_triton(graph, out, tokenizer=tokenizer, **options)
