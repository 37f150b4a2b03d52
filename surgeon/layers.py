"""Finding a model's repeated layers while it is traced, so that each kind is traced once.

The first layer of a kind is traced in place between an `enter` and a `leave` marker; those equal to it (see
`surgeon.signature`) become opaque `layers` nodes, one for each run of them (see `surgeon.runs`). After the trace,
`surgeon.split` cuts the marked regions out and stamps them onto the opaque nodes. A layer that hands tensors to later
layers on the side is not shared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgeon.runs import Example, Kind, Run, made_by_layers
from surgeon.signature import Given, LayerIndex, index_attributes, layer_lists, signature


class Retrace(Exception):
    """The trace assumed two layers equal that are not; trace again with the kind, or the layer's path, in `private`."""


class _Opaque(nn.Module):
    """Stands where an equal layer stood; its parameters are not traced. Other attributes are the layer's own."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["_layer"], self.__dict__["_call"] = layer, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_call"](*args, **kwargs)


class LayerTracer:
    """Replaces the layers of a model by tracing stand-ins for the length of a `with` block."""

    def __init__(self, model: nn.Module, *, share: bool, private: set[str]) -> None:
        self.model, self.share, self.private = model, share, private
        self.kinds: dict[str, Kind] = {}
        self.runs: list[Run] = []
        self._shapes: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        self._indices: dict[str, list[LayerIndex]] = {}
        self._behind: dict[str, tuple[str, str]] = {}
        self._examples: dict[str, Example] = {}
        self._returned: list[Any] = []
        self._irregular: set[str] = set()

    def __enter__(self) -> LayerTracer:
        for list_path, layers in layer_lists(self.model):
            names = index_attributes(layers)
            seen: set[str] = set()
            for position, layer in enumerate(layers):
                path = f"{list_path}.{position}"
                shape = f"{list_path}|{signature(layer, names)}"
                self._shapes.add(shape)
                if self.share and shape in seen and not self.private & {shape, path}:
                    self._replace(layers, position, path, shape)
                else:
                    seen.add(shape)
                    self._wrap(layer, path, shape, names)
        return self

    def __exit__(self, *exc: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def _replace(self, layers: nn.ModuleList, position: int, path: str, shape: str) -> None:
        layer = layers[position]
        self._behind[f"{path.rpartition('.')[0]}.{position - 1}"] = path, shape
        layers[position] = _Opaque(layer, lambda *a, **k: self._follow(path, shape, a, k))
        self._undo.append(functools.partial(layers.__setitem__, position, layer))

    def _wrap(self, layer: nn.Module, path: str, shape: str, names: list[str]) -> None:
        forward = layer.forward
        layer.__dict__["forward"] = lambda *a, **k: self._lead(path, shape, forward, a, k)
        self._undo.append(lambda: layer.__dict__.pop("forward"))
        if self.share and shape not in self.private:
            self._indices[path] = self._watch_indices(layer, names)

    def _watch_indices(self, layer: nn.Module, names: list[str]) -> list[LayerIndex]:
        watchers = []
        for module in layer.modules():
            for name in names:
                value = module.__dict__.get(name)
                if type(value) is int:
                    watcher = LayerIndex(value)
                    watchers.append(watcher)
                    module.__dict__[name] = watcher
                    self._undo.append(functools.partial(module.__dict__.__setitem__, name, value))
        return watchers

    def _lead(self, path: str, shape: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = Given.of(shape, args, kwargs)
        if any(kind.path == path for kind in self.kinds.values()):  # one module called again (ALBERT)
            return self._follow(path, shape, args, kwargs)
        if given.has_foreign() and self.share and shape not in self.private:
            # What one layer of a list is given to write into, all of them are: none of them is shared.
            self.private.update(other for other in self._shapes if _list_of(other) == _list_of(shape))
            raise Retrace
        leaves = list(given.leaves)
        _mark(torch.ops.surgeon.enter, leaves, given.tensors, path)
        args, kwargs = pytree.tree_unflatten(leaves, given.structure)
        results, result_structure = pytree.tree_flatten(forward(*args, **kwargs))
        _mark(torch.ops.surgeon.leave, results, [i for i, x in enumerate(results) if isinstance(x, torch.Tensor)], path)
        alone = path if not self.share or self.private & {shape} else ""
        kind = Kind(path, shape, list(results), result_structure, self._indices.get(path, []))
        self.kinds[given.key + alone] = kind
        self._examples[shape], self._returned = self._example(kind, given), results
        return pytree.tree_unflatten(results, result_structure)

    def _follow(self, path: str, shape: str, args: Any, kwargs: Any) -> Any:
        given = Given.of(shape, args, kwargs)
        kind = self.kinds.get(given.key, self.kinds.get(given.key + path))
        if kind is None:  # called differently from the layer it looks like: the first of a kind of its own
            self.private.add(path)
            raise Retrace
        self._examples[shape] = example = self._example(kind, given)
        run = self._run(path, example)
        call = run.calls[run.taken]
        run.taken += 1
        kind.followers.append(path)
        self._returned = call.results
        return pytree.tree_unflatten(call.results, kind.structure)

    def _example(self, kind: Kind, given: Given) -> Example:
        before = {id(leaf): i for i, leaf in enumerate(self._returned) if isinstance(leaf, torch.Tensor)}
        chained = {i: before[id(given.leaves[i])] for i in given.tensors if id(given.leaves[i]) in before}
        return Example(kind, given, chained)

    def _run(self, path: str, example: Example) -> Run:
        """The run whose next call this is: the last one as was foretold, or one that begins here."""
        layers = path.rpartition(".")[0]
        last = self.runs[-1] if self.runs else None
        if last is not None and last.taken < len(last.calls):
            if last.calls[last.taken].fits(path, example.given):
                return last
            self._irregular.add(layers)  # foretelling costs more than it saves there
        run = Run.beginning(path, example, () if layers in self._irregular else self._following(path))
        self.runs.append(run)
        run.trace(len(self.runs) - 1, _keep_description)
        return run

    def _following(self, path: str) -> Iterator[tuple[str, Example | None]]:
        """The opaque layers right behind a layer, each with the last call of one of its signature."""
        while path in self._behind:
            path, shape = self._behind[path]
            yield path, self._examples.get(shape)


def _mark(marker: Any, leaves: list[Any], tensors: list[int], path: str) -> None:
    """Send the tensors among `leaves` through a marker operator, in place."""
    for position, tensor in zip(tensors, marker([leaves[i] for i in tensors], path), strict=True):
        _keep_description(leaves[position], tensor)
        leaves[position] = tensor


def _list_of(shape: str) -> str:
    return shape.partition("|")[0]


def _alias(xs: list[torch.Tensor], path: str) -> list[torch.Tensor]:
    return [x.view_as(x) for x in xs]


def register_markers() -> None:
    """Give the marker operators their (structure-only) kernels; they never run on values."""
    library = torch.library.Library("surgeon", "IMPL")
    library.impl("enter", _alias, "CompositeExplicitAutograd")
    library.impl("leave", _alias, "CompositeExplicitAutograd")
    library.impl("layers", made_by_layers, "CompositeExplicitAutograd")
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []


def _keep_description(before: Any, after: Any) -> None:
    """A mask keeps its description when it passes through a marker."""
    mask = getattr(before, "surgeon_mask", None)
    if mask is not None:
        after.surgeon_mask = mask


register_markers()
