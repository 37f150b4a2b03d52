"""The ONNX forms that torch's exporter knows: read once for an opset, not for every part of a model.

torch.onnx.export parses the source of some five hundred functions at each call, which is half the time of a small part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

try:  # torch has no public name for it: where it moves, every call reads it again
    from torch.onnx._internal.exporter._registration import ONNXRegistry
except ImportError:
    ONNXRegistry = None  # type: ignore[misc, assignment]
_READ = "from_torchlib"


@contextmanager
def read_once() -> Iterator[None]:
    """In this context torch's exporter gets the forms that an earlier call has read; it does not change them."""
    given = None if ONNXRegistry is None else vars(ONNXRegistry).get(_READ)
    if not isinstance(given, classmethod):
        yield
        return
    setattr(ONNXRegistry, _READ, functools.partial(_read, given.__func__))
    try:
        yield
    finally:
        setattr(ONNXRegistry, _READ, given)


@functools.cache
def _read(read: Callable[..., Any], **options: Any) -> Any:
    return read(ONNXRegistry, **options)
