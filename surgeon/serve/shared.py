"""The bypass of a linear that N processes share (S-LoRA, §6): they exchange x Aᵀ, numbers of rank r, and no more.

COLUMN   low = all-gather(x A_nᵀ);  y_n += low B_n              A by rows, B by outputs
ROW      low = all-reduce(x_n A_nᵀ);  y[n-th outputs] += low B_n;  y = all-reduce(y)
"""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from surgeon.errors import UsageError
from surgeon.serve.bypass import Lows, add, changed, samples
from surgeon.serve.partition import Share
from surgeon.serve.work import Work, work

_LIBRARY = torch.library.Library("surgeon", "FRAGMENT")
_LIBRARY.define(
    "shared_bypass(Tensor y, Tensor x, Tensor? bias, Tensor pool, Tensor rows, Tensor table, Tensor scales, "
    "Tensor owners, *, bool each=False, bool column) -> Tensor"
)
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(size: int) -> Share:
    """Meet the other processes of a server; which of them this one is.

    Raises:
        UsageError: they were not started by torchrun, or are another number.
    """
    hint = f"torchrun --nproc-per-node {size} -m surgeon serve … --tensor-parallel {size}"
    if any(name not in os.environ for name in _TOLD):
        raise UsageError(f"{size} processes are needed, and this one is alone", "--tensor-parallel", hint)
    started = int(os.environ["WORLD_SIZE"])
    if started != size:
        raise UsageError(f"torchrun started {started} processes, and {size} were asked for", "--tensor-parallel", hint)
    if not dist.is_initialized():
        # Followers wait for work for as long as nobody asks.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=365))
    return Share(dist.get_rank(), dist.get_world_size())


def shared_bypass(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    pool: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    owners: torch.Tensor,
    *,
    each: bool = False,
    column: bool,
) -> torch.Tensor:
    """As `surgeon.serve.bypass.pooled_bypass`, one process's part; y is changed in place and returned."""
    flat, given = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    todo = work(rows, table, scales, owners, samples(pool), each)
    if todo is not None:
        width = flat.shape[-1] if column else flat.shape[-1] // dist.get_world_size()
        first = 0 if column else dist.get_rank() * width
        mine, exchange = flat[:, first : first + width], _gathered if column else _summed
        changed(flat, bias, pool, todo, lambda: add(mine, given, pool, todo, exchange))
    if not column:
        dist.all_reduce(flat)
    return y


def _gathered(lows: Lows, todo: Work) -> Lows:
    """The products of all processes, side by side."""
    size, sent = dist.get_world_size(), _flat(lows)
    whole, start, made = sent.new_empty(size, len(sent)), 0, list[torch.Tensor]()
    if len(sent):
        dist.all_gather(list(whole), sent)
    for position, low in enumerate(lows):
        piece = whole[:, start : start + low.numel()]
        start += low.numel()
        if position == 0 and todo.single is not None:
            assert todo.single.order is not None
            made.append(piece.flatten()[todo.single.order])
        else:
            made.append(piece.view(size, *low.shape).transpose(0, 1).flatten(1))
    return made


def _summed(lows: Lows, todo: Work) -> Lows:
    """The sums over all processes."""
    sent = _flat(lows)
    if len(sent):
        dist.all_reduce(sent)
    pieces = sent.split([low.numel() for low in lows])
    return [piece.view(low.shape) for piece, low in zip(pieces, lows, strict=True)]


def _flat(lows: Lows) -> torch.Tensor:
    return torch.cat([low.flatten() for low in lows]) if lows else torch.zeros(0)


def _same(y: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(y)


_LIBRARY.impl("shared_bypass", shared_bypass, "CompositeExplicitAutograd")
torch.library.register_fake("surgeon::shared_bypass", _same, lib=_LIBRARY)
