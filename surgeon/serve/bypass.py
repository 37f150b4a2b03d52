"""Many adapters over one batch: every token goes through its own, out of the pool (S-LoRA, Punica).

    y' = s ⊙ (y + o ⊙ (scale · ((u ⊙ x) Aᵀ ⊙ l) B)) + bias      rows A: [r, in], B: [r, out]; see `surgeon.serve.packed`

A token alone with its adapter meets its rows one by one: a sampled product of x with rows of A, and a weighted sum of
rows of B, both over the pool itself, of any ranks and without a copy or padding. Tokens that share their rows and are
many go through two small matrix products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from surgeon.serve import on_gpu
from surgeon.serve.work import Work, work

_LIBRARY = torch.library.Library("surgeon", "FRAGMENT")
_POOLED = "Tensor pool, Tensor rows, Tensor table, Tensor scales, Tensor owners"
_LIBRARY.define(f"pooled_bypass(Tensor y, Tensor x, Tensor? bias, {_POOLED}, *, bool each=False) -> Tensor")
_LIBRARY.define(f"pooled_input(Tensor x, {_POOLED}, *, bool each=False) -> Tensor")
_LIBRARY.define("pooled_rows(Tensor y, Tensor pool, Tensor index, Tensor rows) -> Tensor")

with warnings.catch_warnings():  # torch says once that its sparse tensors are new
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(
        torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1)
    )


def view(pool: torch.Tensor, width: int) -> torch.Tensor:
    """The pool as rows of a width."""
    count = pool.numel() // width
    return pool[: count * width].view(count, width)


def samples(pool: torch.Tensor) -> bool:
    """Whether torch has the sampled product of this dtype here."""
    return pool.device.type == "cpu" and pool.dtype == torch.float32


def pooled_bypass(
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
) -> torch.Tensor:
    """The equation above at one linear; y `[.., out]` is the base's output with its own `bias`, x `[.., in]` its input.

    y is changed in place and returned, or left and its successor returned.
    """
    made = on_gpu.bypass(y, x, bias, pool, rows, table, scales, owners)
    if made is not None:
        return made
    todo = work(rows, table, scales, owners, samples(pool), each)
    if todo is None:
        return y
    flat, given = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
    changed(flat, bias, pool, todo, lambda: add(flat, given, pool, todo, None))
    return y


Lows = list[torch.Tensor]
"""scale · x Aᵀ: of the tokens by themselves `[m]`, if there are any, then of each group `[n, r]`."""


def add(
    y: torch.Tensor, x: torch.Tensor, pool: torch.Tensor, todo: Work, exchange: Callable[[Lows, Work], Lows] | None
) -> None:
    """y += o ⊙ (scale · ((x Aᵀ) ⊙ l) B); `exchange` completes the products with A where processes share them."""
    lows = _down(x, view(pool, x.shape[-1]), y, pool, todo)
    if exchange is not None:
        lows = exchange(lows, todo)
    _weigh(lows, pool, todo)
    delta = y if todo.out is None else torch.zeros_like(y)
    b_rows, left = view(pool, y.shape[-1]), list(lows)
    if todo.single is not None:
        up = todo.single.patterns(pool.numel() // x.shape[-1], len(b_rows))[1]
        up.values().copy_(left.pop(0))
        delta += torch.sparse.mm(up, b_rows, "sum")
    for group, low in zip(todo.groups, left, strict=True):
        delta[group.tokens].addmm_(low, b_rows[group.b])
    if todo.out is not None:
        delta[todo.out.tokens] *= view(pool, y.shape[-1])[todo.out.rows]
        y += delta


def _down(x: torch.Tensor, a_rows: torch.Tensor, y: torch.Tensor, pool: torch.Tensor, todo: Work) -> Lows:
    lows = []
    if todo.single is not None:
        down = todo.single.patterns(len(a_rows), pool.numel() // y.shape[-1])[0]
        lows.append(torch.sparse.sampled_addmm(down, x, a_rows.T, beta=0.0).values() * todo.single.scale)
    return lows + [(x[group.tokens] @ a_rows[group.a].T) * group.scale.to(x.dtype) for group in todo.groups]


def _weigh(lows: Lows, pool: torch.Tensor, todo: Work) -> None:
    """Products with A times l."""
    groups = lows if todo.single is None else lows[1:]
    for vectors in todo.low:
        factors = view(pool, vectors.rank)
        alone = vectors.places[:, 0] >= 0
        if todo.single is not None:
            lows[0][vectors.places[alone]] *= factors[vectors.rows[alone]]
        for group, low in zip(todo.groups, groups, strict=True):
            if vectors.rank == group.rank:
                inside = (vectors.tokens >= group.tokens.start) & (vectors.tokens < group.tokens.stop)
                low[vectors.tokens[inside] - group.tokens.start] *= factors[vectors.rows[inside]]


def changed(
    y: torch.Tensor, bias: torch.Tensor | None, pool: torch.Tensor, todo: Work, add_delta: Callable[[], None]
) -> None:
    """y in place, with s and a bias of its own for some tokens: the base's is taken off first, and put back last."""
    if todo.output is None and todo.bias is None:
        add_delta()
        return
    tokens = torch.cat([v.tokens for v in (todo.output, todo.bias) if v is not None]).unique()
    if bias is not None:
        y[tokens] -= bias.to(y.dtype)
    add_delta()
    rows = view(pool, y.shape[-1])
    if todo.output is not None:
        y[todo.output.tokens] *= rows[todo.output.rows].to(y.dtype)
    last = y.new_zeros(len(y), y.shape[-1])
    if bias is not None:
        last[tokens] = bias.to(y.dtype)
    if todo.bias is not None:
        last[todo.bias.tokens] = rows[todo.bias.rows].to(y.dtype)
    y.index_add_(0, tokens, last[tokens])


def pooled_input(
    x: torch.Tensor,
    pool: torch.Tensor,
    rows: torch.Tensor,
    table: torch.Tensor,
    scales: torch.Tensor,
    owners: torch.Tensor,
    *,
    each: bool = False,
) -> torch.Tensor:
    """u ⊙ x for the tokens whose adapter has one; x itself where none has."""
    scaled = on_gpu.scaled_input(x, pool, rows, table, owners)
    if scaled is not None:
        return scaled
    todo = work(rows, table, scales, owners, samples(pool), each)
    if todo is None or todo.input is None:
        return x
    made = x.clone()
    flat = made.view(-1, x.shape[-1])
    flat[todo.input.tokens] *= view(pool, x.shape[-1])[todo.input.rows].to(x.dtype)
    return made


def pooled_rows(y: torch.Tensor, pool: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Embedded tokens y `[1, n, h]`, of which those in `index` are rows of the pool."""
    if not len(index):
        return y
    return y.index_copy(1, index, view(pool, y.shape[-1])[rows][None].to(y.dtype))


def _same(y: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(y)


for _name in ("pooled_bypass", "pooled_input", "pooled_rows"):
    _LIBRARY.impl(_name, globals()[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"surgeon::{_name}", _same, lib=_LIBRARY)
