"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, read strictly and written whole.

What differs between methods (fields, keys) is told by the pass: `peft_type`, `peft_config`, `peft_keys`, `from_peft`.
Prompt learning is laid out in `surgeon.peft_prompts`.
Layout: PEFT 0.21, `peft.utils.save_and_load`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from surgeon import peft_parts, peft_prompts, replaced
from surgeon.checkpoint import Checkpoint
from surgeon.errors import CheckFailed, UnsupportedError, UsageError
from surgeon.fold import Fold, folds, rest
from surgeon.graph import Graph, path_of, tag
from surgeon.passes.base import Adapter
from surgeon.peft_keys import adapter_key, below, lone_projection, module_sites, target_parameters, wrappers
from surgeon.peft_targets import target_modules
from surgeon.peft_values import put_all, take
from surgeon.run import owners
from surgeon.safetensors_file import header_bytes, read_shard
from surgeon.sites import sites

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
    """Full name of a tensor an adapter owns or trains → its key in PEFT's file, where it has one of its own."""
    found: dict[str, str] = {}
    items = adapted(graph, owner)
    sites, order = [item.site for item in items], {name: number for number, name in enumerate(graph.tensors)}
    for item in items:
        for param, key in item.step.peft_keys(item.site).items():
            own = item.site.tensor(owner, param)
            full = adapter_key(key, item.site, sites, order)
            found[own if own in graph.tensors else f"{owner}.{param}"] = ROOT + full
    around = {} if step.peft_prompt else wrappers(sites)
    for name in replaced.names(graph, owner, step):
        found[name] = _base_prefix(step) + below(name, around)
    return found


def _own(graph: Graph, owner: str) -> dict[str, tuple[Fold, str]]:
    """Full name of a tensor of one site of an adapter → that site, and the tensor's name there."""
    named = [(item, param) for item in adapted(graph, owner) for param in item.step.peft_keys(item.site)]
    own = {item.site.tensor(owner, param): (item, param) for item, param in named}
    return {name: place for name, place in own.items() if name in graph.tensors}


def part_keys(graph: Graph, owner: str, step: Adapter) -> dict[str, str]:
    """`keys` for an adapter that is part of another one's file."""
    return {name: peft_parts.key_in_host(key, step) for name, key in keys(graph, owner, step).items()}


def _base_prefix(step: Adapter) -> str:
    """PEFT wraps a model that it adapts in place once more than one it gives virtual tokens to."""
    return ROOT if step.peft_prompt else f"{ROOT}model."


def adapted(graph: Graph, owner: str) -> list[Fold]:
    """The sites of one adapter."""
    return [item for item in (*folds(graph), *rest(graph)) if item.owner == owner]


def unfit(graph: Graph, owner: str, step: Adapter) -> str:
    """Why an adapter has no form in PEFT, or ""."""
    if not step.peft_type:
        return f"PEFT has no method {step.name}"
    if step.peft_prompt and graph.task not in TASK_TYPES:
        return f"PEFT has no model for {graph.task} with virtual tokens"
    found = adapted(graph, owner)
    if path := lone_projection([item.site for item in found], sites(graph)):
        return f"it adapts both projections of {path}, or none"
    other = [item.site for item in found if not step.peft_takes(item.site)]
    if other:
        return f"it has no {step.name} at a {other[0].kind}, as {other[0].path} is"
    reason = step.peft_unfit(graph.task)
    return reason or (peft_prompts.unfit(graph, found) if step.peft_prompt else "")


def write_adapter(
    graph: Graph, owner: str, step: Adapter, folder: Path, parts: Mapping[str, Adapter] | None = None
) -> None:
    """Write one adapter of a graph in PEFT's format, with its parts, by their ids (see `surgeon.peft_parts`).

    Raises:
        UnsupportedError: it has no form in PEFT.
    """
    if reason := unfit(graph, owner, step):
        raise UnsupportedError(f"{step.name} has no form in PEFT: {reason}", str(folder), "keep surgeon's work folder")
    graph, step = step.in_peft(graph, owner)
    names = keys(graph, owner, step)
    for part, other in (parts or {}).items():
        names.update(part_keys(graph, part, other))
    if step.peft_prompt:
        names.update({name: _base_prefix(step) + name for name in _head(graph, step)})
    tensors, own = {}, _own(graph, owner)
    for name, key in names.items():
        value = graph.inserted[name]() if name in graph.inserted else graph.values[name]
        if name in own:
            item, param = own[name]
            value = item.step.packed(param, value, item.site)
        tensors[key] = value if not graph.tensors[name].owner else value.float()
    if step.peft_prompt:
        tensors[peft_prompts.KEY] = peft_prompts.table(graph, adapted(graph, owner))
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, dict(sorted(tensors.items())))
    text = json.dumps({**peft_config(graph, owner, step), **peft_parts.fields(parts or {})}, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def peft_config(graph: Graph, owner: str, step: Adapter) -> dict[str, Any]:
    """The whole `adapter_config.json` of one adapter of a graph."""
    found = adapted(graph, owner)
    sites = [item.site for item in found]
    heads = replaced.modules(graph, step.modules_to_save)
    if step.peft_prompt:
        heads += [path for path in _heads(graph) if path not in heads]
        own = peft_prompts.config(graph, found)
    else:
        own = {
            "bias": {"none": "none", "sites": step.peft_bias, "all": "all"}[step.bias],
            "layers_pattern": None,
            "layers_to_transform": None,
            "target_modules": target_modules(module_sites(sites), _modules(graph)),
        }
    # PEFT insists on a saved head for these tasks; without a task it loads the adapter alone.
    lacks_head = graph.task in HEADS and not any(path.rpartition(".")[2] in HEADS[graph.task] for path in heads)
    task_type = None if lacks_head else TASK_TYPES.get(graph.task)
    architecture = (graph.config.architectures or [None])[0]
    base, revision = base_name(graph.source)
    parent = f"transformers.models.{graph.config.model_type}.modeling_{graph.config.model_type}"
    written = {
        "auto_mapping": None if task_type else {"base_model_class": architecture, "parent_library": parent},
        "base_model_name_or_path": base,
        "inference_mode": True,
        "modules_to_save": heads or None,
        "peft_type": step.peft_type,
        "peft_version": FORMAT_VERSION,
        "revision": revision,
        "task_type": task_type,
        **own,
        **step.peft_config(sites),
        **({"target_parameters": parameters} if (parameters := target_parameters(sites, graph)) else {}),
    }
    return {name: value for name, value in written.items() if name not in step.peft_lacks}


def _heads(graph: Graph) -> list[str]:
    """The task heads that PEFT saves beside virtual tokens, trained or not."""
    wanted = HEADS.get(graph.task, ())
    return [path for path in replaced.module_paths(graph) if path in wanted]


def _head(graph: Graph, step: Adapter) -> list[str]:
    """The tensors of those heads that do not train."""
    inside = tuple(f"{path}." for path in _heads(graph))
    return [name for name in graph.tensors if inside and name.startswith(inside)]


def base_name(source: str) -> tuple[str, str | None]:
    """How an adapter names its base: hub id and revision for a folder of the hub's cache, else the absolute path."""
    folder = Path(source).absolute()
    found = re.fullmatch(r".*/models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})", folder.as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else (str(folder), None)


def _modules(graph: Graph) -> set[str]:
    called = {prefix + path_of(node) for prefix, node in graph.nodes() if path_of(node) and tag(node) is None}
    return called | set(replaced.module_paths(graph))


def fill(
    graph: Graph,
    owner: str,
    step: Adapter,
    tensors: dict[str, torch.Tensor],
    where: Path,
    parts: Mapping[str, Adapter] | None = None,
) -> None:
    """Put the tensors of a PEFT file into a graph that has the adapter and the `parts` of its file, in place.

    Raises:
        UsageError: a key is missing or unexpected, or a tensor has another shape than its place; they are named.
    """
    left = dict(tensors)
    if step.peft_prompt:
        peft_prompts.fill(graph, adapted(graph, owner), take(left, peft_prompts.KEY, where), where)
    names = keys(graph, owner, step)
    for name, (item, param) in _own(graph, owner).items():
        if names.get(name) in left:
            left[names[name]] = item.step.unpacked(param, left[names[name]], item.site)
    for part, other in (parts or {}).items():
        names.update(part_keys(graph, part, other))
    for item in adapted(graph, owner):
        for key in item.step.peft_copies(item.site):
            _drop_copy(left, ROOT + key, names.values(), where)
    put_all(graph, names, left, _base_prefix(step), where)


def _drop_copy(left: dict[str, torch.Tensor], key: str, own: Collection[str], where: Path) -> None:
    """Raise UnsupportedError for a copy that is not one of the tensors it should be."""
    copy = left.pop(key, None)
    if copy is not None and not any(other in left and torch.equal(left[other], copy) for other in own):
        what = f"{key} differs from the tensor it is tied to"
        raise UnsupportedError(what, str(where), "save it again with the tie in place")


def check(graph: Graph, owner: str, tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Raise UsageError unless a file of what an adapter computes holds what it computes from its own tensors."""
    step = owners(graph.applied)[owner]
    assert isinstance(step, Adapter)
    if not step.peft_prompt:
        whole, plain = step.in_peft(graph, owner)
        for name, key in keys(whole, owner, plain).items():
            if key not in tensors or not torch.equal(whole.inserted[name](), tensors[key]):
                what = f"{where.name} and the trainable tensors beside it differ in {key}"
                raise UsageError(what, str(where), "one of the two was replaced: take both from the same folder")
        return
    found = peft_prompts.table(graph, adapted(graph, owner))
    stored = take(dict(tensors), peft_prompts.KEY, where)
    if found.shape != stored.shape or not torch.allclose(found, stored, rtol=1e-4, atol=1e-5):
        what = f"{where.name} and the trainable tensors beside it hold different virtual tokens"
        raise UsageError(what, str(where), "one of the two was replaced: take both from the same folder")
