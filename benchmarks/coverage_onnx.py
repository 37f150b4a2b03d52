"""The coverage table's ONNX column: a graph exported in fp32 and replayed in ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir
import torch

from surgeon import run
from surgeon.graph import Graph
from surgeon.lower.onnx.check import replay
from surgeon.lower.onnx.model import build
from surgeon.lower.onnx.ready import exportable
from surgeon.passes import make
from surgeon.verification import make_probes


def error_of(graph: Graph, *, steps: int = 6, length: int = 12) -> float:
    """The largest |Δlogit| of the exported model, generating alone and in a left-padded batch of three.

    Args:
        graph: a causal language model with values.
        steps: tokens generated per prompt.
        length: of the longest prompt.

    Raises:
        SurgeonError: it cannot be exported, or the error is over its bound.
    """
    plain = exportable(graph)
    model = build(run.apply(plain, make("kv_cache")), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        ir.save(model, file, external_data="model.onnx_data")
        found = replay(plain, file, make_probes(plain, length=length), torch.float32, steps)
    found.require(graph.config.model_type)
    return found.max_error
