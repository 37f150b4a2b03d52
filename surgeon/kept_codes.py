"""Codes that a work folder keeps, because no base and no options give them again: those of a calibration.

One tensor is in memory at a time, when they are written and when they are read.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from surgeon.checkpoint import Checkpoint
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.peft_values import check_shape
from surgeon.safetensors_file import header_bytes, read_shard

FILE = "codes.safetensors"
_AGAIN = "apply the method again: surgeon apply"


def write(graph: Graph, owner: str, file: Path) -> None:
    """The tensors of a quantiser, by their names in the graph."""
    names = _names(graph, owner)
    layouts = [(name, graph.tensors[name].dtype or torch.float32, graph.tensors[name].shape) for name in names]
    with file.open("wb") as stream:
        stream.write(header_bytes(layouts))
        for name, dtype, _ in layouts:
            tensor = graph.inserted[name]().detach().to("cpu", dtype).contiguous()
            stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read(graph: Graph, owner: str, file: Path) -> None:
    """The same tensors as values of a graph, mapped from the file when they are asked for.

    Raises:
        UsageError: the file is missing or damaged, or holds other tensors.
    """
    if not file.is_file():
        raise UsageError(f"the folder has no {file.name}", str(file.parent), _AGAIN)
    kept, names = Checkpoint(file.parent, {}, (read_shard(file),)), _names(graph, owner)
    if odd := sorted(set(names) ^ set(kept.tensors)):
        raise UsageError(f"missing or unexpected tensor: {', '.join(odd[:3])}", str(file), _AGAIN)
    for name in names:
        check_shape(name, kept.tensors[name].shape, graph.tensors[name].shape, file)
        graph.inserted[name] = functools.partial(kept.read, name)


def _names(graph: Graph, owner: str) -> list[str]:
    """Codes of a weight beside its scales; in the header the widest come first, so that all are aligned."""
    own = [name for name, spec in graph.tensors.items() if spec.owner == owner]
    return sorted(own, key=lambda name: (graph.tensors[name].dtype is torch.uint8, name))
