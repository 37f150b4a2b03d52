"""`--target onnx`: from what users name to `surgeon.lower.onnx.export`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnxscript

from surgeon.lower.onnx import adapters
from surgeon.lower.onnx import demo as page
from surgeon.lower.onnx.export import OnnxReport, export_onnx
from surgeon.lower.opening import opened
from surgeon.model import SurgeonModel

assert onnxscript  # torch's exporter imports it late, and fails with an error of its own


def export(
    work: str | Path | SurgeonModel,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    adapter: Sequence[str | Path] = (),
    demo: bool = False,
    runtime: Path | None = None,
    **options: Any,
) -> OnnxReport:
    """Export a folder or a loaded model; options are those of `export_onnx`.

    Args:
        work: a work folder, a PEFT adapter folder, a plain checkpoint, or a loaded model.
        out: the new folder.
        base: the base of an adapter, where the folder's own record of it no longer holds.
        rank: of adapters that have every rank (DyLoRA); their highest if not given.
        demo: put a page that runs the model in a browser beside it, see `surgeon.lower.onnx.demo`.
        runtime: the folder with what that page needs (a `node_modules`); from npm if not given.
        adapter: folders of adapters that are compiled and verified with an export that has slots.
        options: see `surgeon.lower.onnx.export.export_onnx`.
    """
    graph, tokenizer = opened(work, base, rank)
    given = adapters.read_all(adapter, graph)
    with page.runtime(runtime) if demo else nullcontext() as files:
        return export_onnx(graph, out, tokenizer=tokenizer, given=given, demo=files, **options)
