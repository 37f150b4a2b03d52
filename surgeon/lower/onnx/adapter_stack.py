"""Several adapters of one stacked export as one: the base is number 0, and every row of a batch has a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from surgeon.lower.onnx.adapter_file import SLOTS, defaults, empty
from surgeon.lower.onnx.adapter_forms import Array


def stacked(parts: Sequence[Mapping[str, Array]], record: Mapping[str, Any]) -> dict[str, Array]:
    """Adapters one above the other, padded to the largest rank; the base is number 0, the first is number 1."""
    known, found = record[SLOTS]["inputs"], dict[str, Array]()
    for name in dict.fromkeys(name for part in parts for name in part):
        base = empty(name, known[name][1:], record[SLOTS]["dtype"])
        values = [base, *(part.get(name, base) for part in parts)]
        shape = np.max([value.shape for value in values], 0)
        found[name] = np.stack([_padded(value, shape) for value in values])
    return {**found, **_same_count(found, len(parts) + 1, record)}


def _padded(value: Array, shape: npt.NDArray[np.int64]) -> Array:
    """A factor for every channel, or more ranks that are 0."""
    if value.ndim == 1:
        return np.broadcast_to(value, shape)
    return np.pad(value, [(0, int(size) - have) for size, have in zip(shape, value.shape, strict=True)])


def _same_count(found: Mapping[str, Array], count: int, record: Mapping[str, Any]) -> dict[str, Array]:
    """What no adapter of a stack changes, as often as there are adapters: a row is looked up in every slot."""
    left = {name: value for name, value in defaults(record).items() if name not in found}
    return {name: np.repeat(value, count, 0) for name, value in left.items()}
