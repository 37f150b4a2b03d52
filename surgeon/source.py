"""Opening what users name: a folder or a hub id, as a checkpoint, a config and a graph with values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from surgeon.buffers import materialise_buffers
from surgeon.capture import capture_config
from surgeon.checkpoint import Checkpoint
from surgeon.coded import CodedCheckpoint, decoded, with_codes
from surgeon.context import extend
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.heads import fresh_modules
from surgeon.labels import LABELLED
from surgeon.remote_code import check_known, is_trusted
from surgeon.tasks import Task, find_task
from surgeon.weights import ModelWeights

DOWNLOADED = ("*.json", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Source:
    """A base model on disk.

    Attributes:
        folder: where it is.
        checkpoint: its files, checked.
        config: its Hugging Face config.
        task: what it is captured for.
        labels: names of the classes, where they were chosen; they are in the config too.
        context: length in tokens the config was made to reach, 0 for its own.
    """

    folder: Path
    checkpoint: Checkpoint
    config: transformers.PretrainedConfig
    task: Task
    labels: tuple[str, ...] = ()
    context: int = 0

    @property
    def name(self) -> str:
        """What others know it by: the hub id of a downloaded model, else its folder's name, without the path to it."""
        folder = self.folder.absolute()
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/")
        return folder.name


def resolve(name: str | Path, *, weights: bool = True) -> Path:
    """The local folder of a path or of a hub id, downloading the latter's config, tokenizer and safetensors.

    Pickles are not downloaded; with `weights=False` nor are safetensors.

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
        patterns = [*DOWNLOADED, *(["*.safetensors"] if weights else []), *(["*.py"] if is_trusted() else [])]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:
        raise UsageError(
            f"no folder {name}, and it cannot be downloaded",
            f"{type(error).__name__}: {error}".splitlines()[0],
            "check the name and the network, or give a local folder",
        ) from error


def open_source(
    name: str | Path,
    task: str | None = None,
    *,
    weights: bool = True,
    labels: Sequence[str] = (),
    context: int = 0,
) -> Source:
    """Open a base model; with `weights=False` its config is enough.

    `labels` names the classes of a classifier; `context` is the length to scale positions to (see `surgeon.context`).

    Raises:
        UsageError: the folder lacks files, or they are damaged (see `surgeon.checkpoint`), or the model needs code of
            its own (see `surgeon.remote_code`).
    """
    folder = resolve(name, weights=weights)
    checkpoint = decoded(Checkpoint.open(folder, weights=weights))
    check_known(checkpoint.config, folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=is_trusted())
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"transformers cannot read the config: {reason}",
            str(folder / "config.json"),
            "check model_type; surgeon doctor shows the installed transformers",
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    found = find_task(task, config.architectures, str(folder))
    _set_labels(config, found, tuple(labels))
    if context:
        extend(config, context)
    return Source(folder, checkpoint, config, found, tuple(labels), context)


def _set_labels(config: transformers.PretrainedConfig, task: Task, labels: tuple[str, ...]) -> None:
    """The classes in the config, from which transformers makes the head; a span has a start and an end.

    A decoder finds the last token of a sequence by the padding token: without one it is the end token.
    """
    text = config.get_text_config()
    if task.name == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        ends = getattr(text, "eos_token_id", None)
        config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    if labels:
        if task.name not in LABELLED:
            hint = f"leave them out, or name a task with classes: {', '.join(LABELLED)}"
            raise UsageError(f"a model for {task.name} has no classes to name", "--labels", hint)
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
        if task.name == "sequence-classification" and len(labels) == 1:
            config.problem_type = "regression"
    elif task.name == "question-answering":
        config.num_labels = 2


def open_graph(source: Source, *, values: bool = True, seed: int = 0) -> Graph:
    """Capture a base model; with `values` its weights are mapped, to be read when needed.

    A pair that the config calls tied and the checkpoint stores as two different tensors is captured untied. What the
    checkpoint lacks (a new head) is drawn from `seed`.
    """
    config = source.config
    loaded: Mapping[str, torch.Tensor] = {}
    if values:
        weights, buffers = read_weights(source, seed)
        if weights.untied:
            config.tie_word_embeddings = False
            weights, buffers = read_weights(source, seed)
        loaded = Values(weights, buffers)
    graph = capture_config(config, source.task)
    graph = dataclasses.replace(graph, values=loaded, source=str(source.folder), labels=source.labels)
    graph = dataclasses.replace(graph, context=source.context)
    return with_codes(dataclasses.replace(graph, fresh=fresh_modules(graph, source)))


def read_weights(source: Source, seed: int = 0) -> tuple[ModelWeights, dict[str, torch.Tensor]]:
    """The checkpoint as the model's parameters, and the buffers no checkpoint stores."""
    auto = getattr(transformers, source.task.auto_class)
    dtype = stored_dtype(source)
    with torch.device("meta"):
        model = auto.from_config(source.config, dtype=dtype, trust_remote_code=is_trusted())
    model.tie_weights()
    if isinstance(source.checkpoint, CodedCheckpoint):
        turned = [path for path, module in model.named_modules() if type(module).__name__ == "Conv1D"]
        source.checkpoint.transpose(turned)
    weights = ModelWeights(source.checkpoint, model, seed, resized=bool(source.labels))
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
