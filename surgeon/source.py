"""Opening what users name: a folder or a hub id, as a checkpoint, a config and a graph with values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from surgeon.buffers import materialise_buffers
from surgeon.capture import capture_config
from surgeon.checkpoint import Checkpoint
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.tasks import Task, find_task
from surgeon.weights import ModelWeights


@dataclass(frozen=True)
class Source:
    """A base model on disk.

    Attributes:
        folder: where it is.
        checkpoint: its files, checked.
        config: its Hugging Face config.
        task: what it is captured for.
    """

    folder: Path
    checkpoint: Checkpoint
    config: transformers.PretrainedConfig
    task: Task


def resolve(name: str | Path) -> Path:
    """The local folder of a path or of a hub id, downloading the latter's safetensors, config and tokenizer.

    Raises:
        UsageError: there is no such folder, and no such model can be downloaded.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UsageError(
            f"no folder {name}", str(folder.absolute().parent), "give a folder with a config.json or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:
        raise UsageError(
            f"no folder {name}, and it cannot be downloaded",
            f"{type(error).__name__}: {error}".splitlines()[0],
            "check the name and the network, or give a local folder",
        ) from error


def open_source(
    name: str | Path, task: str | None = None, *, weights: bool = True, trust_remote_code: bool = False
) -> Source:
    """Open a base model; with `weights=False` its config is enough.

    Raises:
        UsageError: the folder lacks files, or they are damaged (see `surgeon.checkpoint`).
    """
    folder = resolve(name)
    checkpoint = Checkpoint.open(folder, weights=weights)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"transformers cannot read the config: {reason}",
            str(folder / "config.json"),
            "check model_type; surgeon doctor shows the installed transformers",
        ) from error
    return Source(folder, checkpoint, config, find_task(task, config.architectures, str(folder)))


def open_graph(source: Source, *, values: bool = True) -> Graph:
    """Capture a base model; with `values` its weights are mapped, to be read when needed.

    A pair that the config calls tied and the checkpoint stores as two different tensors is captured untied.
    """
    config = source.config
    if not values:
        return dataclasses.replace(capture_config(config, source.task), source=str(source.folder))
    weights, buffers = read_weights(source)
    if weights.untied:
        config.tie_word_embeddings = False
        weights, buffers = read_weights(source)
    graph = capture_config(config, source.task)
    return dataclasses.replace(graph, values=Values(weights, buffers), source=str(source.folder))


def read_weights(source: Source) -> tuple[ModelWeights, dict[str, torch.Tensor]]:
    """The checkpoint as the model's parameters, and the buffers no checkpoint stores."""
    auto = getattr(transformers, source.task.auto_class)
    dtype = stored_dtype(source)
    with torch.device("meta"):
        model = auto.from_config(source.config, dtype=dtype)
    model.tie_weights()
    weights = ModelWeights(source.checkpoint, model)
    materialise_buffers(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    return weights, buffers


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype of the checkpoint: what its config says, else that of its first floating tensor."""
    named = source.config.dtype
    if isinstance(named, torch.dtype):
        return named
    for info in source.checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            return info.dtype
    return torch.float32


class Values(dict[str, torch.Tensor]):
    """Weights read when asked for, and computed buffers, under one mapping."""

    def __init__(self, weights: ModelWeights, buffers: dict[str, torch.Tensor]) -> None:
        super().__init__(buffers)
        self.weights = weights

    def __missing__(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.weights
