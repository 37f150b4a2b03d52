"""From transformers' mask functions to the semantic description that the attention node carries.

Transformers builds every attention mask from composable functions of (batch, head, query, key) indices. `describe`
reads the composition into causal / window / chunk; `check` evaluates both on indices around every boundary. What cannot
be described stays an explicit mask, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import masking_utils

from surgeon import ops
from surgeon.errors import UnsupportedError

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, by position: see `surgeon.ops.visible` for the three fields."""

    causal: bool = False
    window: int = 0
    chunk: int = 0


def describe(function: MaskFunction) -> Mask | None:
    """The description of a transformers mask function, or None if it is composed of anything unknown."""
    if function is masking_utils.causal_mask_function:
        return Mask(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Mask()
    name = getattr(function, "__qualname__", "")
    cells = _cells(function)
    if name.startswith("and_masks."):
        return _joined([describe(part) for part in cells["mask_functions"]])
    if name.startswith(("sliding_window_overlay.", "sliding_window_bidirectional_overlay.")):
        return Mask(window=int(cells["sliding_window"])) if cells["sliding_window"] else None
    if name.startswith("chunked_overlay."):
        return Mask(chunk=int(cells["chunk_size"]))
    return None


def check(function: MaskFunction, mask: Mask) -> None:
    """Raise UnsupportedError unless `mask` and the transformers mask function agree at every boundary.

    Both are functions of index differences and of chunk numbers, so they are compared at all pairs of positions within
    two of a multiple of the window and of the chunk; chunks also with leading padding of 0, 1 and 3.
    """
    positions = _boundaries(mask)
    query, key = positions[:, None], positions[None, :]
    zero = torch.zeros((), dtype=torch.int64)
    for padding in (0, 1, 3) if mask.chunk else (0,):
        theirs = _with_padding(function, padding)(zero, zero, query, key)
        ours = ops.pattern(query, key, padding, causal=mask.causal, window=mask.window, chunk=mask.chunk)
        if not torch.equal(*torch.broadcast_tensors(theirs, ours)):
            raise UnsupportedError(
                f"the attention mask is not what its description {mask} says",
                getattr(function, "__qualname__", repr(function)),
                "report this architecture; capture with attention='sdpa' keeps the explicit mask",
            )


def _cells(function: Callable[..., object]) -> dict[str, Any]:
    closure = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if hasattr(function, "__code__") else ()
    return {name: cell.cell_contents for name, cell in zip(names, closure, strict=True)}


def _joined(parts: list[Mask | None]) -> Mask | None:
    masks = [part for part in parts if part is not None]
    if len(masks) != len(parts) or sum(m.window > 0 for m in masks) > 1 or sum(m.chunk > 0 for m in masks) > 1:
        return None
    return Mask(any(m.causal for m in masks), max(m.window for m in masks), max(m.chunk for m in masks))


def _boundaries(mask: Mask) -> torch.Tensor:
    steps = [step for step in (mask.window, mask.chunk) if step] or [4]
    near = {multiple * step + shift for step in steps for multiple in range(4) for shift in range(-2, 3)}
    return torch.tensor(sorted(position for position in near if position >= 0))


def _with_padding(function: MaskFunction, padding: int) -> MaskFunction:
    """The same mask function with its traced left-padding tensor replaced by a real one."""
    cells = _cells(function)
    if "mask_functions" in cells:
        return masking_utils.and_masks(*(_with_padding(part, padding) for part in cells["mask_functions"]))
    if "left_padding" in cells:
        return masking_utils.chunked_overlay(int(cells["chunk_size"]), torch.tensor(padding).reshape(()).expand(1))
    return function
