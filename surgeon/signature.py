"""What makes two layers equal: the same classes, simple attributes and tensor shapes, called with the same arguments.

A layer's own index is an attribute that counts up from layer to layer. It is replaced by a `LayerIndex`, which
remembers being read: a layer whose arithmetic depends on its position is not equal to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_SIMPLE = (int, float, bool, str, type(None), torch.dtype)


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


@dataclass
class Given:
    """What a layer is called with.

    Attributes:
        key: text that is equal for equal layers called with the same arguments up to tensor values.
        leaves: the arguments, flattened.
        structure: how to put them together again.
        tensors: positions of the leaves that are tensors.
        sizes: positions of the leaves that are symbolic sizes.
    """

    key: str
    leaves: list[Any]
    structure: pytree.TreeSpec
    tensors: list[int]
    sizes: list[int]

    @classmethod
    def of(cls, shape: str, args: Any, kwargs: Any) -> Given:
        """The arguments of a call of a layer with this signature."""
        leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: _is_mutable(x) and x is not kwargs)
        words = [_word(leaf) for leaf in leaves]
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        sizes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.SymInt)]
        return cls(f"{shape}\n{structure}\n{words}", leaves, structure, tensors, sizes)

    def has_foreign(self) -> bool:
        """Whether an argument is something a layer may write into: a cache, a dictionary."""
        return any(not isinstance(leaf, (*_SIMPLE, torch.Tensor, torch.SymInt)) for leaf in self.leaves)


def _word(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        known = [size if isinstance(size, int) else "?" for size in leaf.shape]
        return f"{leaf.dtype}{known}{getattr(leaf, 'surgeon_mask', None)}"
    return "size" if isinstance(leaf, torch.SymInt) else str(_plain(leaf))


def _is_mutable(value: Any) -> bool:
    """Dictionaries and lists stay whole: a layer may write into them, which a rebuilt copy would lose."""
    return isinstance(value, (dict, list))
