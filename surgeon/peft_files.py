"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, read strictly and written whole.

What differs between methods (fields, keys) is told by the pass: `peft_type`, `peft_config`, `peft_keys`, `from_peft`.
Layout: PEFT 0.21, `peft.utils.save_and_load`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from surgeon import replaced
from surgeon.checkpoint import Checkpoint
from surgeon.errors import CheckFailed, UnsupportedError, UsageError
from surgeon.fold import Fold, columns, folds
from surgeon.graph import Graph, path_of, tag
from surgeon.passes.base import Adapter
from surgeon.peft_targets import target_modules
from surgeon.safetensors_file import header_bytes, read_shard

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model."
FORMAT_VERSION = "0.21.0"
AGAIN = "download or save the adapter again"
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "features": "FEATURE_EXTRACTION",
}
# Tasks for which PEFT always loads a head beside the adapter, and what it may be called.
HEADS = {
    "sequence-classification": ("classifier", "score"),
    "token-classification": ("classifier", "score"),
    "question-answering": ("qa_outputs",),
}


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter folder.

    Raises:
        UsageError: the file is missing or not a JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"the folder has no {CONFIG}", str(folder), "name a folder with an adapter of surgeon or PEFT")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{CONFIG} is not valid JSON: {error}", str(path), AGAIN) from error
    if not isinstance(config, dict):
        raise UsageError(f"{CONFIG} is not a JSON object", str(path), AGAIN)
    return config


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file; half precision becomes fp32, as in PEFT.

    Raises:
        UsageError: the file is missing, a pickle, damaged, or holds a tensor that is not finite or no float.
    """
    if not file.is_file():
        if file.with_name(PICKLE).is_file():
            raise UsageError(
                "the adapter is a pickle, which can run code and is never loaded", str(file.with_name(PICKLE)),
                "load it with PEFT where you trust it and save it again: PEFT writes safetensors",
            )  # fmt: skip
        raise UsageError(f"the folder has no {file.name}", str(file.parent), AGAIN)
    shard = read_shard(file)
    checkpoint = Checkpoint(file.parent, {}, (shard,))
    found = {}
    for info in shard.tensors:
        if not info.dtype.is_floating_point:
            raise UsageError(f"{info.name} is {info.dtype_name}, not floating point", str(file), AGAIN)
        tensor = checkpoint.read(info.name).float()
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(
                f"{info.name} holds NaN or Inf", str(file), "its training diverged: take an earlier checkpoint"
            )
        found[info.name] = tensor
    return found


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, one tensor at a time, in the order given.

    Raises:
        CheckFailed: a tensor is not finite.
    """
    with file.open("wb") as stream:
        stream.write(header_bytes((name, t.dtype, tuple(t.shape)) for name, t in tensors.items()))
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckFailed(f"{name} holds NaN or Inf", str(file.parent), "train again with a lower --lr")
            stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def keys(graph: Graph, owner: str, step: Adapter) -> dict[str, str]:
    """Full name of every tensor an adapter owns or trains → its key in PEFT's file."""
    found: dict[str, str] = {}
    sites = adapted(graph, owner)
    for item in sites:
        for param, key in item.step.peft_keys(item.site).items():
            own = item.site.tensor(owner, param)
            found[own if own in graph.tensors else f"{owner}.{param}"] = ROOT + key
    paths = {item.site.path for item in sites}
    for name in replaced.names(graph, owner, step):
        found[name] = base_key(name, paths)
    return found


def base_key(name: str, adapted_paths: set[str]) -> str:
    """PEFT's key of a tensor of the base, which lies below `base_layer` where its module is adapted."""
    module, _, leaf = name.rpartition(".")
    return f"{ROOT}model.{module}.{'base_layer.' if module in adapted_paths else ''}{leaf}"


def adapted(graph: Graph, owner: str) -> list[Fold]:
    """The sites of one adapter."""
    return [item for item in (*folds(graph), *columns(graph)) if item.owner == owner]


def write_adapter(graph: Graph, owner: str, step: Adapter, folder: Path) -> None:
    """Write one adapter of a graph in PEFT's format."""
    names = keys(graph, owner, step)
    tensors = {}
    for name, key in sorted(names.items(), key=lambda pair: pair[1]):
        value = graph.inserted[name]() if name in graph.inserted else graph.values[name]
        tensors[key] = value if not graph.tensors[name].owner else value.float()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors)
    text = json.dumps(peft_config(graph, owner, step), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def peft_config(graph: Graph, owner: str, step: Adapter) -> dict[str, Any]:
    """The whole `adapter_config.json` of one adapter of a graph."""
    sites = [item.site for item in adapted(graph, owner)]
    heads = replaced.modules(graph, step.modules_to_save)
    loads_head = graph.task in HEADS and not any(path.rpartition(".")[2] in HEADS[graph.task] for path in heads)
    # PEFT insists on a saved head for these tasks; without a task it loads the adapter alone.
    task_type = None if loads_head else TASK_TYPES[graph.task]
    architecture = (graph.config.architectures or [None])[0]
    base, revision = base_name(graph.source)
    parent = f"transformers.models.{graph.config.model_type}.modeling_{graph.config.model_type}"
    return {
        "auto_mapping": None if task_type else {"base_model_class": architecture, "parent_library": parent},
        "base_model_name_or_path": base,
        "bias": {"none": "none", "sites": step.peft_bias, "all": "all"}[step.bias],
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": heads or None,
        "peft_type": step.peft_type,
        "peft_version": FORMAT_VERSION,
        "revision": revision,
        "target_modules": target_modules([site.path for site in sites], _modules(graph)),
        "task_type": task_type,
        **step.peft_config(sites),
    }


def base_name(source: str) -> tuple[str, str | None]:
    """How an adapter names its base: hub id and revision for a folder of the hub's cache, else the absolute path."""
    folder = Path(source).absolute()
    found = re.fullmatch(r".*/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})", folder.as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else (str(folder), None)


def _modules(graph: Graph) -> set[str]:
    called = {prefix + path_of(node) for prefix, node in graph.nodes() if path_of(node) and tag(node) is None}
    return called | set(replaced.module_paths(graph))


def fill(graph: Graph, owner: str, step: Adapter, tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Put the tensors of a PEFT file into a graph that has the adapter, in place.

    Raises:
        UsageError: a key is missing or unexpected, or a tensor has another shape than its place; they are named.
    """
    wanted = keys(graph, owner, step)
    left = dict(tensors)
    _drop_tables(graph, left, set(wanted.values()), where)
    missing = [key for key in wanted.values() if key not in left]
    _complain(missing, "missing", where)
    for name, key in wanted.items():
        put(graph, name, left.pop(key), key, where)
    _complain(list(left), "unexpected", where)


def put(graph: Graph, name: str, tensor: torch.Tensor, key: str, where: Path) -> None:
    """Give a tensor of the graph a value; raises UsageError for another shape."""
    spec = graph.tensors[name]
    if tuple(tensor.shape) != spec.shape:
        raise UsageError(
            f"{key} is {list(tensor.shape)} in the adapter, and its place in the base is {list(spec.shape)}",
            str(where), "the adapter is for another base or another rank: name its own base with --base",
        )  # fmt: skip
    graph.inserted[name] = replaced.Held(tensor)


def _drop_tables(graph: Graph, left: dict[str, torch.Tensor], wanted: set[str], where: Path) -> None:
    """PEFT may store the base's whole embedding beside an adapter; the base has it.

    Raises:
        UnsupportedError: it is another table: resized, or trained.
    """
    for key in [key for key in left if key not in wanted]:
        name = key.removeprefix(f"{ROOT}model.").replace(".base_layer.", ".")
        if graph.resolve(name) not in graph.tensors or name in graph.inserted:
            continue
        table, own = left.pop(key), graph.values[graph.resolve(name)]
        if tuple(table.shape) != tuple(own.shape):
            what = f"{key} is {list(table.shape)}, and the base's own is {list(own.shape)}: it was resized"
        elif not torch.equal(table.to(own.dtype), own):
            what = f"{key} is not the base's own {name}"
        else:
            continue
        raise UnsupportedError(what, str(where), "save the base with this table in it, and name that with --base")


def _complain(found: list[str], kind: str, where: Path) -> None:
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise UsageError(
            f"{kind} adapter key{'s' * (len(found) > 1)}: {', '.join(sorted(found)[:3])}{more}", str(where),
            "the adapter is for another base, or the file was cut: name its own base with --base, or save it again",
        )  # fmt: skip
