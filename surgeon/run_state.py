"""The state of a training run on disk: a tree of tensors and plain values, as safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from surgeon.errors import SurgeonError, UsageError

MODEL = "model.safetensors"
_TENSOR, _TUPLE, _ITEMS = "$tensor", "$tuple", "$items"


def save_tree(tree: Any, folder: Path, name: str) -> None:
    """Writes a tree of dicts, lists, tuples, numbers, strings and tensors to `name`.json and `name`.safetensors."""
    tensors: dict[str, Tensor] = {}
    plain = _packed(tree, tensors, name)
    (folder / f"{name}.json").write_text(json.dumps(plain))
    _write(tensors, folder / f"{name}.safetensors")


def load_tree(folder: Path, name: str) -> Any:
    """Reads what `save_tree` wrote. Raises UsageError if a file is missing or corrupt."""
    try:
        plain = json.loads((folder / f"{name}.json").read_text())
        return _unpacked(plain, safetensors.torch.load_file(folder / f"{name}.safetensors"))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise _broken(folder, name, error) from error


def save_trainable(model: nn.Module, folder: Path) -> None:
    """Writes the parameters that train."""
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    _write(tensors, folder / MODEL)


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Reads the parameters that train. Raises UsageError unless names and shapes are exactly the model's."""
    try:
        stored = safetensors.torch.load_file(folder / MODEL)
    except (OSError, safetensors.SafetensorError) as error:
        raise _broken(folder, MODEL, error) from error
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differ = sorted(name for name in own.keys() | stored.keys() if _shape(own, name) != _shape(stored, name))
    if differ:
        what = f"the checkpoint is of another model: {differ[0]} is {_shape(stored, differ[0])} there and "
        hint = "resume with the methods and options that the run began with"
        raise UsageError(what + f"{_shape(own, differ[0])} here", str(folder), hint)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def random_state() -> dict[str, Any]:
    """The states of all generators that training draws from: Python's, NumPy's, torch's on CPU and CUDA."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], *rest),
        "cpu": torch.get_rng_state(),
    }
    return {**state, "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Sets all generators to what `random_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a file; what the system refuses (a full disk) is an OSError as everywhere, not safetensors' own error."""
    try:
        safetensors.torch.save_file(tensors, file)
    except safetensors.SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(file)) from error


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "absent"


def _broken(folder: Path, name: str, error: Exception) -> UsageError:
    what = f"the checkpoint's {name} is missing or corrupt: {error}"
    return UsageError(what, str(folder), "delete this checkpoint and resume from the one before it")


def _packed(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        # A copy: state may alias memory, which the format does not allow.
        tensors[path] = value.detach().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _packed(item, tensors, f"{path}.{key}") for key, item in value.items()}
        return {_ITEMS: _packed([[key, item] for key, item in value.items()], tensors, path)}
    if isinstance(value, (list, tuple)):
        packed = [_packed(item, tensors, f"{path}.{number}") for number, item in enumerate(value)]
        return packed if isinstance(value, list) else {_TUPLE: packed}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise SurgeonError(f"a {type(value).__name__} cannot be saved with a run", path, "keep tensors and plain values")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpacked(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in value[_ITEMS]}
    return {key: _unpacked(item, tensors) for key, item in value.items()}
