"""A checkpoint seen as the parameters of a model, one at a time.

Checkpoint names and layouts differ from the model's (older names, a missing `model.` prefix, one tensor per expert
where the model has all of them fused). transformers describes this by conversion objects; they are used here on one
parameter at a time, where `from_pretrained` runs them over the whole model. The values are those of `from_pretrained`,
bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from surgeon.buffers import initialise_missing
from surgeon.checkpoint import Checkpoint
from surgeon.errors import UnsupportedError, UsageError


@dataclass
class _Group:
    """Checkpoint tensors that together make one or several parameters; `converter` is None for a plain rename."""

    first: str
    converter: Any
    parts: list[tuple[str, str]] = field(default_factory=list)


class ModelWeights(Mapping[str, torch.Tensor]):
    """Parameter or persistent buffer name → value on the CPU, read and converted when it is asked for.

    `model` is a transformers model on the meta device; only its structure is used. Values have the dtype that
    `from_pretrained(dtype=model.dtype)` gives them. A value that is stored as it is needed is a view of the file.

    missing: parameters that the checkpoint lacks (a new classification head); the model's own `_init_weights` makes
        them, from `seed`. A parameter that transformers expects to be absent is not listed.
    unexpected: checkpoint tensors that the model does not use.
    tied: alias → the parameter that holds its value.
    untied: aliases by config.json whose checkpoint holds two different tensors: they stay apart.

    Raises UsageError if a tensor has another shape than its parameter, unless it is one of a head that is `resized`
    and begins anew; UnsupportedError for a quantised checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, seed: int = 0, *, resized: bool = False) -> None:
        method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
        if method is not None:
            what, hint = f"the checkpoint is quantised ({method})", "use the checkpoint it was quantised from"
            raise UnsupportedError(what, str(checkpoint.folder), hint)
        self.checkpoint, self.model, self._seed, self._resized = checkpoint, model, seed, resized
        self._meta: dict[str, torch.Tensor] = model.state_dict()
        self._dtype_of = _dtype_rule(model)
        self._group_of: dict[str, _Group] = {}
        self._last: tuple[_Group, dict[str, torch.Tensor]] | None = None
        self._fresh: dict[str, torch.Tensor] | None = None
        self.tied: dict[str, str] = {}
        self.untied: tuple[str, ...] = ()
        unexpected = self._plan()
        self._absent = set(self._meta) - set(self._group_of)
        self._tie()
        self.missing, self.unexpected = self._filtered(unexpected)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The value of a parameter or persistent buffer."""
        owner = self._owner(name)
        group = self._group_of.get(owner)
        if group is None:
            return self._initialised()[owner]
        if group.converter is None:
            return self.checkpoint.read(group.parts[0][1]).to(self.dtype(owner))
        if self._last is None or self._last[0] is not group:
            self._last = None
            values = self._convert(group, meta=False)
            if len(values) == 1:
                return values[owner]
            self._last = (group, values)
        return self._last[1][owner]

    def __iter__(self) -> Iterator[str]:
        """The names of the model's `state_dict`, in its order."""
        return iter(self._meta)

    def __len__(self) -> int:
        return len(self._meta)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a parameter or buffer; nothing is read."""
        return name in self._meta

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the value: the model's, or fp32 where the architecture insists on it."""
        return self._dtype_of(name, self._meta[name].dtype)

    def sources(self, name: str) -> tuple[str, ...]:
        """The checkpoint tensors that `name` is made of, in order; empty if the checkpoint lacks it."""
        group = self._group_of.get(self._owner(name))
        return tuple(source for _, source in group.parts) if group is not None else ()

    def direct(self, name: str) -> str | None:
        """The checkpoint tensor that `name` *is* (same shape, no operation, at most a cast), else None."""
        group = self._group_of.get(self._owner(name))
        return group.parts[0][1] if group is not None and group.converter is None else None

    def siblings(self, name: str) -> tuple[str, ...]:
        """All parameters made from the same checkpoint tensors, `name` among them."""
        group = self._group_of.get(self._owner(name))
        return tuple(other for other, its in self._group_of.items() if its is group) if group is not None else ()

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape."""
        return tuple(self._meta[name].shape)

    def converter(self, name: str) -> Any:
        """A fresh copy of transformers' `WeightConverter` that makes `name`; None for a direct or missing one."""
        group = self._group_of.get(self._owner(name))
        return copy.deepcopy(group.converter) if group is not None else None

    def _owner(self, name: str) -> str:
        if name not in self._meta:
            raise KeyError(name)
        while name in self.tied:
            name = self.tied[name]
        return name

    def _plan(self) -> dict[str, str]:
        """Assign every checkpoint tensor to a group; returns renamed → stored name of those with no place.

        Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`, which loads as it goes.
        """
        mapping = get_model_conversion_mapping(self.model)
        renamings = self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix = self.model.base_model_prefix
        groups: dict[str, _Group] = {}
        unexpected: dict[str, str] = {}
        # Some renamings depend on what came before: transformers' order must be kept.
        for stored in sorted(self.checkpoint.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, self._meta)
            if name not in self._meta and stored in self._meta:
                name, pattern = rename_source_key(stored, [], [], prefix, self._meta)
            if name not in self._meta:
                unexpected[name] = stored
                continue
            group = groups.setdefault(name, _Group(name, by_pattern[pattern] if pattern is not None else None))
            if group.converter is None:
                group.parts[:] = [(stored, stored)]
            else:
                group.parts.append((stored if pattern is None else pattern, stored))
        for group in groups.values():
            self._place(group)
        return unexpected

    def _place(self, group: _Group) -> None:
        if group.converter is None:
            shapes = {group.first: self.checkpoint.info(group.parts[0][1]).shape}
        else:
            # On meta tensors the conversion costs nothing and says what it would produce.
            shapes = {name: tuple(value.shape) for name, value in self._convert(group, meta=True).items()}
        for name, shape in shapes.items():
            if name not in self._meta:
                continue
            if shape != tuple(self._meta[name].shape):
                if self._resized and not name.startswith(f"{self.model.base_model_prefix}."):
                    continue
                what = f"{name} is {list(shape)} in the checkpoint and {list(self._meta[name].shape)} in the model"
                hint = "config.json does not belong to these weights: use the config they were saved with"
                raise UsageError(what, str(self.checkpoint.folder), hint)
            self._group_of[name] = group

    def _convert(self, group: _Group, meta: bool) -> dict[str, torch.Tensor]:
        converter = copy.deepcopy(group.converter)
        dtype = self.dtype(group.first)
        for pattern, stored in group.parts:
            converter.add_tensor(group.first, stored, pattern, _reader(self.checkpoint, stored, dtype, meta))
        try:
            values = converter.convert(group.first, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, KeyError) as error:
            hint = "a tensor of this group is missing or has another shape: download the checkpoint again"
            what = f"{group.first} cannot be made from {len(group.parts)} checkpoint tensors ({error})"
            raise UsageError(what, str(self.checkpoint.folder), hint) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in values.items()}

    def _tie(self) -> None:
        """Resolve tied names as `PreTrainedModel.tie_weights` does when it loads: to the one that is stored."""
        pairs = list(getattr(self.model, "all_tied_weights_keys", {}).items())
        untied = []
        for position, (target, source) in enumerate(pairs):
            if target not in self._absent and source not in self._absent:
                if not self._equal(target, source):
                    untied.append(target)
                    continue
            elif target not in self._absent:
                target, source = source, target
            elif source in self._absent:
                others = [alias for alias, owner in pairs[position + 1 :] if owner == source]
                source = next((alias for alias in others if alias not in self._absent), source)
            if self._owner(source) != self._owner(target):
                self.tied[target] = source
            if source not in self._absent:
                self._absent.discard(target)
        self.tied = {alias: self._owner(alias) for alias in self.tied}
        self.untied = tuple(untied)

    def _equal(self, one: str, other: str) -> bool:
        if self._owner(one) == self._owner(other):
            return True
        equal = torch.equal(self[one], self[other])
        self.checkpoint.release()
        return equal

    def _filtered(self, unexpected: dict[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        found = SimpleNamespace(missing_keys=self._absent - set(self.tied), unexpected_keys=set(unexpected))
        self.model._adjust_missing_and_unexpected_keys(found)
        left = {unexpected[name] for name in found.unexpected_keys}
        return (
            tuple(name for name in self._meta if name in found.missing_keys),
            tuple(name for name in self.checkpoint.tensors if name in left),
        )

    def _initialised(self) -> dict[str, torch.Tensor]:
        if self._fresh is None:
            names = [name for name in self._meta if name in self._absent and name not in self.tied]
            self._fresh = initialise_missing(self.model, names, self._seed)
        return self._fresh


def _reader(checkpoint: Checkpoint, stored: str, dtype: torch.dtype, meta: bool) -> Any:
    if meta:
        return lambda: torch.empty(checkpoint.info(stored).shape, dtype=dtype, device="meta")
    return lambda: checkpoint.read(stored).to(dtype)


def _dtype_rule(model: PreTrainedModel) -> Any:
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return lambda name, dtype: dtype
    pattern, by_group, _ = build_glob_alternation(list(plan))

    def rule(name: str, dtype: torch.dtype) -> torch.dtype:
        found = pattern.search(name)
        return plan[by_group[found.lastgroup]] if found is not None else dtype

    return rule
