"""The ONNX forms that torch's exporter knows: read once for an opset, not for every part of a model.

torch.onnx.export parses the source of some five hundred functions at each call, which is half the time of a small part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_READ = "from_torchlib"


@contextmanager
def read_once() -> Iterator[None]:
    """In this context torch's exporter gets the forms that an earlier call has read; it does not change them."""
    registry = _registry()
    given = None if registry is None else vars(registry).get(_READ)
    if not isinstance(given, classmethod):
        yield
        return
    setattr(registry, _READ, functools.partial(_read, given.__func__, registry))
    try:
        yield
    finally:
        setattr(registry, _READ, given)


def _registry() -> Any:
    """torch has no public name for it: None where it has moved, and every call reads it again."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        return None
    return ONNXRegistry


@functools.cache
def _read(read: Callable[..., Any], registry: Any, **options: Any) -> Any:
    return read(registry, **options)
