"""Results that are made once for the tensors they follow from."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor

Result = TypeVar("Result")


class Remembered(Generic[Result]):
    """A function of tensors that nobody changes: called again with the very same ones it gives the same result.

    Options do not tell calls apart: they are the same for the same tensors. Nothing outlives its tensors.
    """

    def __init__(self, make: Callable[..., Result]) -> None:
        self._make = make
        self._known: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], Result]] = {}

    def __call__(self, *tensors: Tensor, **options: Any) -> Result:
        """The result for these tensors."""
        key = tuple(map(id, tensors))
        found = self._known.get(key)
        if found is not None and all(ref() is tensor for ref, tensor in zip(found[0], tensors, strict=True)):
            return found[1]
        made = self._make(*tensors, **options)
        self._known[key] = ([weakref.ref(tensor, lambda _: self._known.pop(key, None)) for tensor in tensors], made)
        return made
