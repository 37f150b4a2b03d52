"""The coverage table's ONNX column: exported and replayed in ONNX Runtime, or the reason why not."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir
import torch

from surgeon import run
from surgeon.errors import SurgeonError
from surgeon.graph import Graph
from surgeon.lower.onnx import exportable
from surgeon.lower.onnx_check import replay
from surgeon.lower.onnx_model import build
from surgeon.passes import make
from surgeon.verification import make_probes


def onnx_row(graph: Graph, *, steps: int = 6, length: int = 12) -> str:
    """Whether a graph with values exports to fp32 ONNX and generates the same: "yes", or the reason in one line.

    Args:
        graph: a causal language model.
        steps: tokens generated per prompt, alone and in a left-padded batch of three.
        length: of the longest prompt.
    """
    try:
        plain = exportable(graph)
        model = build(run.apply(plain, make("kv_cache")), torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "model.onnx")
            ir.save(model, file, external_data="model.onnx_data")
            replay(plain, file, make_probes(plain, length=length), torch.float32, steps).require("")
    except SurgeonError as error:
        return error.what.splitlines()[0]
    except Exception as error:  # a row of a table, not a command: whatever happened is what it says
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return "yes"
