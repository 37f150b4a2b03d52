"""What is left of a trained model when it is deployed: sizes on disk, and its loss merged, in 4 bits and in ONNX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from surgeon import api, run, store
from surgeon.compare.onnx_loss import Exported
from surgeon.errors import SurgeonError
from surgeon.evaluate import evaluate
from surgeon.graph import Graph
from surgeon.lower.merge import merge
from surgeon.lower.onnx.export import MODEL, export_onnx
from surgeon.model import load_model
from surgeon.passes import make
from surgeon.samples import Data

Found = dict[str, float | str]
"""The loss after each way, or why it cannot be gone."""


def saved(graph: Graph, folder: Path) -> dict[str, int]:
    """Numbers and bytes of the files that hold what was trained."""
    if not graph.applied:
        specs = [(graph.tensors[name], graph.values[name].dtype) for name in graph.trainable()]
        return {
            "stored": sum(spec.count for spec, _ in specs),
            "checkpoint_bytes": sum(spec.count * dtype.itemsize for spec, dtype in specs),
        }
    store.save(graph, folder)
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    return {"stored": _numbers(files), "checkpoint_bytes": size}


def _numbers(files: list[Path]) -> int:
    from surgeon.safetensors_file import read_shard

    return sum(torch.Size(info.shape).numel() for file in files for info in read_shard(file).tensors)


def losses(graph: Graph, tokenizer: Any, held: Data, place: Path, *, onnx: bool) -> Found:
    """The held-out loss by the way the model is deployed."""
    merged = functools.cache(lambda: _merged(graph, tokenizer, place / "merged"))
    ways: dict[str, Callable[[], float]] = {
        "merged": lambda: _loss(merged(), tokenizer, held),
        "4bit": lambda: _loss(run.apply(merged(), make("nf4")), tokenizer, held),
    }
    if onnx:
        ways["onnx"] = lambda: _exported(graph, tokenizer, held, place / "onnx")
    found: Found = {}
    for name, way in ways.items():
        try:
            found[name] = way()
        except SurgeonError as error:
            found[name] = error.what.splitlines()[0]
    return found


def _merged(graph: Graph, tokenizer: Any, folder: Path) -> Graph:
    """What is read from the files of a merged checkpoint, and of what lies beside it."""
    merge(graph, api.base_of(graph), folder, tokenizer=tokenizer, verify=False)
    return api.read(folder, graph.task)


def _exported(graph: Graph, tokenizer: Any, held: Data, folder: Path) -> float:
    """In ONNX Runtime, fp32, one text at a time."""
    export_onnx(graph, folder, tokenizer=tokenizer, verify=False)
    return evaluate(Exported(folder / MODEL, graph.config, graph.task), tokenizer, held, batch_size=1).loss


def _loss(graph: Graph, tokenizer: Any, held: Data) -> float:
    return evaluate(load_model(graph, dtype=torch.float32), tokenizer, held).loss
