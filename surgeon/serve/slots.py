"""Where a batch's tokens lie in the pages of the pool, and which requests are attended together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgeon.remembered import Remembered
from surgeon.serve.layout import COLUMN_BIAS, COUNT, FIRST, LENGTH, PAST, WINDOWED


@dataclass(frozen=True)
class Slots:
    """Where a batch's tokens lie; the same at all attentions with the same learned columns.

    Attributes:
        requests: request of each new token `[n]`.
        blocks: which of the request's pages it lies in `[n]`.
        offsets: place in that page `[n]`.
        together: requests with one new token each, in groups of similar length.
        alone: (request, its first token in the batch, new tokens, old tokens) of the others.
    """

    requests: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    together: tuple[Group, ...]
    alone: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class Group:
    """Requests with one new token that are attended together.

    Attributes:
        tokens: that token of each `[b]`.
        requests: which `[b]`.
        front: of how many pages of learned columns come first `[b, 1]`.
        numbers: 0 to the number of pages `[b, n]`.
        places: position of every cell of the pages: columns are before 0, and what is empty is beyond every token
            `[b, n · block]`.
        last: position of the new token `[b, 1]`.
        windowed: whether a window hides the columns `[b, 1]`.
        columns: how many learned columns there are `[b, 1]`.
    """

    tokens: torch.Tensor
    requests: torch.Tensor
    front: torch.Tensor
    numbers: torch.Tensor
    places: torch.Tensor
    last: torch.Tensor
    windowed: torch.Tensor
    columns: torch.Tensor


_EMPTY = 2**40


def _slots(spans: torch.Tensor, prefix: torch.Tensor, *, block: int, each: bool) -> Slots:
    counts, past = spans[:, COUNT], spans[:, PAST]
    request = torch.repeat_interleave(counts)
    position = torch.arange(len(request), device=spans.device) - spans[request, FIRST] + past[request]
    listed, learned = spans.tolist(), prefix.tolist()
    single = [i for i, (_, count, _) in enumerate(listed) if count == 1 and learned[i][COLUMN_BIAS] < 0 and not each]
    alone = [(i, *listed[i]) for i in sorted({*range(len(listed))} - {*single})]
    if each:
        alone = [(i, first + n, 1, past + n) for i, first, count, past in alone for n in range(count)]
    groups = tuple(_group(chosen, spans, prefix, block) for chosen in _similar(single, listed, learned, block))
    return Slots(request, position // block, position % block, groups, tuple(alone))


def _similar(single: list[int], spans: list[list[int]], prefix: list[list[int]], block: int) -> list[list[int]]:
    """Requests in groups in which nobody has less than half of the longest's pages."""
    sizes = {i: -(-(spans[i][PAST] + 1) // block) + -(-prefix[i][LENGTH] // block) for i in single}
    groups: list[list[int]] = []
    for i in sorted(single, key=sizes.__getitem__, reverse=True):
        if groups and 2 * sizes[i] >= sizes[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _group(chosen: list[int], spans: torch.Tensor, prefix: torch.Tensor, block: int) -> Group:
    index = torch.tensor(chosen, device=spans.device)
    own, learned = spans[index], prefix[index]
    columns, last = learned[:, LENGTH, None], own[:, PAST, None]
    front = -(-columns // block)
    total = int((front + last // block + 1).max())
    cell = torch.arange(total * block, device=spans.device).expand(len(chosen), -1)
    text = cell - front * block
    places = torch.where(text < 0, torch.where(cell < columns, cell - columns, _EMPTY), text)
    numbers = torch.arange(total, device=spans.device).expand(len(chosen), -1)
    return Group(own[:, FIRST], index, front, numbers, places, last, learned[:, WINDOWED, None], columns)


slots = Remembered(_slots)
"""Where the tokens of a batch lie, of its spans, its learned columns, `block` and `each`."""
