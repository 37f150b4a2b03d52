"""`--target triton`: from what users name to `surgeon.lower.triton`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgeon.errors import UnsupportedError
from surgeon.kernels.jit import missing
from surgeon.lower.opening import opened
from surgeon.lower.triton import TritonReport, export_triton
from surgeon.model import SurgeonModel


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
    graph, tokenizer = opened(work, base, rank)
    return export_triton(graph, out, tokenizer=tokenizer, **options)
