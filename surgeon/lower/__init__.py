"""Lowering: one file per target, from a final graph to what production runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import UnsupportedError, UsageError, nearest

if TYPE_CHECKING:
    from surgeon.model import SurgeonModel

TARGETS = {name: f"surgeon.lower.to_{name}" for name in ("hf", "onnx", "triton", "vllm", "sglang")}
"""Target → module with `export(work, out, **options)`, imported when it is asked for."""


def export(work: str | Path | SurgeonModel, out: str | Path, *, target: str = "onnx", **options: Any) -> Any:
    """Lower a work folder, an adapter folder, a plain checkpoint or a loaded model to a target's format.

    Args:
        work: what to export.
        out: the new folder.
        target: one of `TARGETS`.
        options: of the target; all take `overwrite` and `verify`.

    Raises:
        UsageError: no such target.
        UnsupportedError: a package the target needs is not installed.
    """
    if target not in TARGETS:
        raise UsageError(f"no target named {target!r}", "--target", f"did you mean {nearest(target, TARGETS)}?")
    try:
        module = importlib.import_module(TARGETS[target])
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        if name not in ("onnx", "onnx_ir", "onnxruntime", "onnxscript", "triton"):
            raise
        raise UnsupportedError(
            f"--target {target} needs the package {name}", "not installed", f"pip install model-surgeon[{target}]"
        ) from error
    return module.export(work, out, **options)
