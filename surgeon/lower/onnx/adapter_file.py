"""Adapters for the slots of an export: written, and loaded again with the checks that ONNX Runtime leaves out.

An `.onnx_adapter` holds the slots that an adapter fills; the others keep the base's values. A `.safetensors` file holds
all of them, for runtimes where every slot is a required input: whoever loads it feeds what is in it. Both carry the
`model_version` of the export they were made for, a hash of its base and slots. An export of two models has two files
per adapter: ONNX Runtime refuses one that has a name more than the model. Needs numpy and onnxruntime alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgeon.atomic import atomic_file
from surgeon.errors import UsageError, nearest
from surgeon.lower.onnx.adapter_forms import Array, read_native, read_plain, write_native, write_plain

MANIFEST, SLOTS = "surgeon.json", "slots"
NATIVE, PLAIN = ".onnx_adapter", ".safetensors"
INITIAL = "initial."
"""Before the name of a tensor that is no slot but keys or values to start the cache with."""
LEAVES = ("lora_A", "lora_B", "in_scale", "out_scale", "out_shift")
"""The slots of a linear."""
FACTORS, SCALED = LEAVES[2:4], LEAVES[2:]
_PREFIXED = re.compile(r"prefix\.\d+(\.(encoder|decoder|cross))?\.(key|value)")
IDS, COUNT = "adapter_ids", "adapters"


@dataclass(frozen=True)
class Loaded:
    """An adapter, as what a session is fed.

    Attributes:
        inputs: slot → its value.
        initial: `past_key_values.<i>.key/value` → what the cache starts with `[1, h_kv, p, d]`, where the export's
            attentions have no slot for a prefix.
        ids: of a stack, which adapter each row of a batch has; () for no stack.
    """

    inputs: Mapping[str, Array]
    initial: Mapping[str, Array]
    ids: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """p: how many tokens the cache starts with. The mask is that much longer, and positions start there."""
        return next((int(value.shape[2]) for value in self.initial.values()), 0)

    def feed(self, batch: int = 1, session: Any = None) -> dict[str, Array]:
        """The inputs of every step, for a batch of this size; of one of two models, those that its session has."""
        ids = {IDS: np.resize(np.array(self.ids, np.int64), batch)} if self.ids else {}
        found: dict[str, Array] = {**self.inputs, **ids}
        if session is None:
            return found
        known = {node.name for node in (*session.get_inputs(), *session.get_overridable_initializers())}
        return {name: value for name, value in found.items() if name in known}

    def past(self, batch: int = 1) -> dict[str, Array]:
        """The cache before the first token, for a batch of this size; empty for none."""
        return {name: np.repeat(value, batch, 0) for name, value in self.initial.items()}


def is_slot(name: str) -> bool:
    """Whether an input is a slot, or says which adapter a row has."""
    return name == IDS or name.rpartition(".")[2] in LEAVES or _PREFIXED.fullmatch(name) is not None


def read_export(folder: str | Path) -> dict[str, Any]:
    """The manifest of an export that has slots.

    Raises:
        UsageError: it is no export, its manifest is damaged, or it has no slots.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise UsageError(f"the folder has no {MANIFEST}", str(folder), "name a folder from surgeon export")
    try:
        record: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{MANIFEST} is not valid JSON: {error}", str(file), "export the model again") from error
    if not isinstance(record, dict) or not isinstance(record.get(SLOTS), dict):
        what = "the export has no slots: its adapters are merged, or there were none"
        raise UsageError(what, str(folder), "surgeon export MODEL --target onnx --adapters slots")
    if record[SLOTS].get("model_version") != model_version(record):
        raise UsageError(f"{MANIFEST} was changed after the export", str(file), "export the model again")
    return record


def model_version(record: Mapping[str, Any]) -> int:
    """A hash of 31 bits of an export's base and slots: what its adapters carry."""
    known = {key: value for key, value in record[SLOTS].items() if key != "model_version"}
    text = json.dumps([record["base"], known], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def defaults(record: Mapping[str, Any]) -> dict[str, Array]:
    """The base's values of all slots of an export."""
    dtype = np.dtype(record[SLOTS]["dtype"])
    return {name: empty(name, shape, dtype) for name, shape in record[SLOTS]["inputs"].items() if name != IDS}


def empty(name: str, shape: Sequence[int | str], dtype: npt.DTypeLike) -> Array:
    """What a slot is for the base: no rank, no column, a factor of 1, a shift of 0; a stack has one of it."""
    leaf = name.rpartition(".")[2]
    free = int(leaf in SCALED)
    sizes = [size if isinstance(size, int) else 1 if size == COUNT else free for size in shape]
    return np.full(sizes, float(leaf in FACTORS), dtype)


def check(tensors: Mapping[str, Array], record: Mapping[str, Any], where: str) -> None:
    """Raise UsageError unless these are values of an export's slots: names, shapes and dtypes."""
    slots, dtype = record[SLOTS], np.dtype(record[SLOTS]["dtype"])
    known = {**slots["inputs"], **{INITIAL + name: shape for name, shape in slots["initial"].items()}}
    known.pop(IDS, None)
    for name, value in tensors.items():
        if name not in known:
            raise UsageError(f"the export has no slot {name}", where, f"nearest: {nearest(name, known)}")
        if not _fits(value.shape, _sizes(name, known)):
            what = f"{name} is {list(value.shape)}, and its slot is {known[name]}"
            raise UsageError(what, where, "name the base that the adapter was made for")
        if value.dtype != dtype:
            raise UsageError(f"{name} is {value.dtype}, and its slot is {dtype}", where, "compile it: surgeon adapter")
        path, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            a, b = tensors.get(f"{path}.lora_A"), tensors.get(f"{path}.lora_B")
            if a is None or b is None or a.shape[-1] != b.shape[-2]:
                raise UsageError(f"{path} has a lora_A and a lora_B of different ranks", where, "compile it again")


def _sizes(name: str, known: Mapping[str, Sequence[int | str]]) -> list[set[int] | int | str]:
    """The sizes that each axis may have."""
    path, _, leaf = name.rpartition(".")
    if leaf not in SCALED:
        return list(known[name])
    whole: Any = known[f"{path}.lora_A"][-2] if leaf == "in_scale" else known[f"{path}.lora_B"][-1]
    return [*known[name][:-1], {1, int(whole)}]


def _fits(shape: Sequence[int], wanted: Sequence[set[int] | int | str]) -> bool:
    return len(shape) == len(wanted) and all(
        isinstance(size, str) or (found in size if isinstance(size, set) else found == size)
        for found, size in zip(shape, wanted, strict=True)
    )


def files(path: str | Path, record: Mapping[str, Any]) -> dict[Path, list[str]]:
    """The files of an adapter, and the slots that each may hold; of an export of two models one for each.

    Of `x.onnx_adapter` they are called `x.encoder_model.onnx_adapter` and `x.decoder_model_merged.onnx_adapter`.
    """
    path, known = Path(path), record[SLOTS]
    if "parts" not in known:
        return {path: [*known["inputs"], *(INITIAL + name for name in known["initial"])]}
    stem = path.stem
    for part in known["parts"]:
        stem = stem.removesuffix(f".{part}")
    return {path.with_name(f"{stem}.{part}{path.suffix}"): names for part, names in known["parts"].items()}


def write(tensors: Mapping[str, Array], record: Mapping[str, Any], path: str | Path) -> int:
    """Write an adapter for an export, in the form its suffix names; returns its size in bytes.

    The files are those of `files`.

    Raises:
        UsageError: the suffix is another, or a tensor is no value of a slot; nothing is written.
    """
    path = Path(path)
    form(path)
    check(tensors, record, str(path))
    version, whole = int(record[SLOTS]["model_version"]), path.suffix == PLAIN
    values, places = {**(defaults(record) if whole else {}), **tensors}, files(path, record)
    with ExitStack() as stack:
        for place, names in places.items():
            temporary = stack.enter_context(atomic_file(place))
            own = {name: value for name, value in values.items() if name in names}
            (write_plain if whole else write_native)(own, version, temporary)
    return sum(place.stat().st_size for place in places)


def form(path: Path) -> str:
    """The suffix of an adapter's file; raises UsageError for one that is none of ours."""
    if path.suffix not in (NATIVE, PLAIN):
        raise UsageError(f"'{path.name}' is no name of an adapter", str(path), f"end it with {NATIVE} or {PLAIN}")
    return path.suffix


def load(path: str | Path, export: str | Path) -> Loaded:
    """An adapter's file for an export, checked: made for it, names, shapes and dtypes.

    ONNX Runtime itself does not compare versions. Feed the result to a session (`Loaded.feed`, `Loaded.past`), or hand
    the same `.onnx_adapter` to `onnxruntime.LoraAdapter` or `onnxruntime_genai.Adapters` after this check.

    Args:
        path: an `.onnx_adapter` or `.safetensors` file; of two files (`files`) the name without the model's.
        export: the folder it was made for.

    Raises:
        UsageError: the file is missing or damaged, or made for another export.
    """
    record, tensors = read_export(export), dict[str, Array]()
    form(Path(path))
    for file in files(path, record):
        tensors |= _read(file, record, export)
    check(tensors, record, str(path))
    return as_loaded(tensors, record)


def _read(path: Path, record: Mapping[str, Any], export: str | Path) -> dict[str, Array]:
    """The tensors of one file."""
    if not path.is_file():
        raise UsageError("there is no such adapter", str(path), f"surgeon adapter FOLDER --for {export}")
    try:
        tensors, version = (read_plain if path.suffix == PLAIN else read_native)(path)
    except Exception as error:  # both readers raise their own classes for what is no such file
        raise UsageError(f"the adapter cannot be read: {error}", str(path), "compile it again") from error
    if version != record[SLOTS]["model_version"]:
        what = f"the adapter was made for another export (version {version}, not {record[SLOTS]['model_version']})"
        raise UsageError(what, str(path), f"surgeon adapter FOLDER --for {export}")
    return tensors


def as_loaded(tensors: Mapping[str, Array], record: Mapping[str, Any]) -> Loaded:
    """Values of an export's slots as what a session is fed; the base's, if there are none."""
    inputs = {name: value for name, value in tensors.items() if not name.startswith(INITIAL)}
    initial = {name.removeprefix(INITIAL): v for name, v in tensors.items() if name.startswith(INITIAL)}
    if not record[SLOTS]["optional"]:
        inputs = {**defaults(record), **inputs}
    return Loaded(inputs, initial, (0,) if record[SLOTS]["form"] == "stacked" else ())
