"""Finding a model's repeated layers while it is traced, so that each kind is traced once.

The first layer of a kind is traced in place between an `enter` and a `leave` marker; every equal layer becomes one
opaque `layer` node. After the trace, `surgeon.split` cuts the marked regions out and stamps them onto the opaque nodes.

Two layers are equal when their modules have the same classes, simple attributes and tensor shapes, and are called with
the same arguments up to tensor values. A layer's own index is replaced by a `LayerIndex` that remembers being read: a
layer whose arithmetic depends on its position is not shared. Nor is one that hands tensors to later layers on the side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_SIMPLE = (int, float, bool, str, type(None), torch.dtype)


class Retrace(Exception):
    """The trace assumed two layers equal that are not; trace again with the kind, or the layer's path, in `private`."""


class LayerIndex:
    """Stands in for a layer's index and remembers whether anything but a cache looked at it."""

    def __init__(self, index: int) -> None:
        self.index, self.read = index, False


def _reading(name: str) -> Callable[..., Any]:
    def method(self: LayerIndex, *args: Any) -> Any:
        self.read = True
        return getattr(self.index, name)(*args)

    return method


_READS = (
    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__ __mod__ "
    "__rmod__ __pow__ __neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __bool__ __int__ __float__ "
    "__index__ __str__ __repr__ __format__ __and__ __rand__"
)
for _name in _READS.split():
    setattr(LayerIndex, _name, _reading(_name))


@dataclass
class Kind:
    """The first layer of a kind: where its trace lies and what it returned."""

    path: str
    shape: str
    outputs: list[torch.Tensor]
    structure: pytree.TreeSpec
    indices: list[LayerIndex] = field(default_factory=list)
    followers: list[str] = field(default_factory=list)


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
        self.paths: list[str] = []
        self._shapes: set[str] = set()
        self._undo: list[Callable[[], None]] = []
        self._indices: dict[str, list[LayerIndex]] = {}

    def __enter__(self) -> LayerTracer:
        for list_path, layers in layer_lists(self.model):
            names = index_attributes(layers)
            seen: set[str] = set()
            for position, layer in enumerate(layers):
                path = f"{list_path}.{position}"
                self.paths.append(path)
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
        key, leaves, structure, tensors, _ = _call_key(shape, args, kwargs)
        if any(kind.path == path for kind in self.kinds.values()):  # one module called again (ALBERT)
            return self._follow(path, shape, args, kwargs)
        if any(_is_foreign(leaf) for leaf in leaves) and self.share and shape not in self.private:
            # What one layer of a list is given to write into, all of them are: none of them is shared.
            self.private.update(other for other in self._shapes if _list_of(other) == _list_of(shape))
            raise Retrace
        entered = torch.ops.surgeon.enter([leaves[i] for i in tensors], path)
        for position, tensor in zip(tensors, entered, strict=True):
            _keep_description(leaves[position], tensor)
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        results, result_structure = pytree.tree_flatten(forward(*args, **kwargs))
        outputs = [i for i, leaf in enumerate(results) if isinstance(leaf, torch.Tensor)]
        left = torch.ops.surgeon.leave([results[i] for i in outputs], path)
        for position, tensor in zip(outputs, left, strict=True):
            _keep_description(results[position], tensor)
            results[position] = tensor
        alone = path if not self.share or self.private & {shape} else ""
        self.kinds[key + alone] = Kind(path, shape, list(results), result_structure, self._indices.get(path, []))
        return pytree.tree_unflatten(results, result_structure)

    def _follow(self, path: str, shape: str, args: Any, kwargs: Any) -> Any:
        key, leaves, _, tensors, sizes = _call_key(shape, args, kwargs)
        kind = self.kinds.get(key, self.kinds.get(key + path))
        if kind is None:  # called differently from the layer it looks like: the first of a kind of its own
            self.private.add(path)
            raise Retrace
        kind.followers.append(path)
        outputs = [leaf for leaf in kind.outputs if isinstance(leaf, torch.Tensor)]
        _STACK.append(outputs)
        try:
            made = iter(torch.ops.surgeon.layer([leaves[i] for i in tensors], [leaves[i] for i in sizes], path))
        finally:
            _STACK.pop()
        results = [next(made) if isinstance(leaf, torch.Tensor) else leaf for leaf in kind.outputs]
        for before, after in zip(kind.outputs, results, strict=True):
            _keep_description(before, after)
        return pytree.tree_unflatten(results, kind.structure)


def _list_of(shape: str) -> str:
    return shape.partition("|")[0]


_STACK: list[list[torch.Tensor]] = []


def _alias(xs: list[torch.Tensor], path: str) -> list[torch.Tensor]:
    return [x.view_as(x) for x in xs]


def _layer(xs: list[torch.Tensor], sizes: list[int], path: str) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in _STACK[-1]]


def register_markers() -> None:
    """Give the marker operators their (structure-only) kernels; they never run on values."""
    library = torch.library.Library("surgeon", "IMPL")
    library.impl("enter", _alias, "CompositeExplicitAutograd")
    library.impl("leave", _alias, "CompositeExplicitAutograd")
    library.impl("layer", _layer, "CompositeExplicitAutograd")
    _LIBRARIES.append(library)


_LIBRARIES: list[torch.library.Library] = []


def layer_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost `ModuleList`s of composite modules, with their paths."""
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        if len(module) and all(any(True for _ in child.children()) for child in module):
            found.append((path, module))
    return found


def index_attributes(layers: nn.ModuleList) -> list[str]:
    """Names of integer attributes that grow by one from each layer to the next: a layer's own index."""
    counts: dict[str, list[int]] = {}
    for layer in layers:
        own = {n: v for m in layer.modules() for n, v in m.__dict__.items() if type(v) is int and not n.startswith("_")}
        for name, value in own.items():
            counts.setdefault(name, []).append(value)
    steady = [n for n, v in counts.items() if len(v) == len(layers) and v == list(range(v[0], v[0] + len(v)))]
    return steady if len(layers) > 1 else []


def signature(layer: nn.Module, ignored: list[str]) -> str:
    """Everything about a layer's module tree that can change its trace, as text."""
    lines = []
    for path, module in layer.named_modules():
        attributes = {
            name: _plain(value)
            for name, value in sorted(module.__dict__.items())
            if name not in ignored and not name.startswith("_") and name not in ("forward", "training")
        }
        tensors = [(n, tuple(t.shape), t.dtype, t.requires_grad) for n, t in module.named_parameters(recurse=False)]
        tensors += [(n, tuple(t.shape), t.dtype, False) for n, t in module.named_buffers(recurse=False)]
        lines.append(f"{path} {type(module).__module__}.{type(module).__qualname__} {attributes} {tensors}")
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return getattr(value, "__qualname__", type(value).__qualname__)


def _call_key(shape: str, args: Any, kwargs: Any) -> tuple[str, list[Any], pytree.TreeSpec, list[int], list[int]]:
    leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: _is_mutable(x) and x is not kwargs)
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    sizes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.SymInt)]
    words = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            sizes_known = [size if isinstance(size, int) else "?" for size in leaf.shape]
            words.append(f"{leaf.dtype}{sizes_known}{getattr(leaf, 'surgeon_mask', None)}")
        elif isinstance(leaf, torch.SymInt):
            words.append("size")
        else:
            words.append(str(_plain(leaf)))
    return f"{shape}\n{structure}\n{words}", leaves, structure, tensors, sizes


def _is_mutable(value: Any) -> bool:
    """Dictionaries and lists stay whole: a layer may write into them, which a rebuilt copy would lose."""
    return isinstance(value, (dict, list))


def _is_foreign(leaf: Any) -> bool:
    return not isinstance(leaf, (*_SIMPLE, torch.Tensor, torch.SymInt))


def _keep_description(before: Any, after: Any) -> None:
    """A mask keeps its description when it passes through a marker."""
    mask = getattr(before, "surgeon_mask", None)
    if mask is not None:
        after.surgeon_mask = mask


register_markers()
