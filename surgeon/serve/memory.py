"""Who is in the pool: adapters in use, adapters that wait there until the room is needed, and the tokens of requests.

Room is promised before it is taken. What is promised (adapters in use, and every page a running request may ever need)
never exceeds the pool, so a request that was admitted can always go on; what is not promised is lent to idle adapters,
and the one longest unused goes first when the room is needed.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from surgeon.errors import SurgeonError
from surgeon.serve.layout import Layout, kv_views
from surgeon.serve.packed import Packed
from surgeon.serve.pool import Pool, PoolFull

_placements = itertools.count()


@dataclass(eq=False)
class Resident:
    """An adapter in the pool.

    Attributes:
        packed: what it is.
        pages: all its pages.
        where: number of each of its rows in the pool's view of the row's width, int64.
        columns: attention → pages of its learned keys and values.
        pins: how many users it has.
        placed: another number every time something is placed: what was remembered of an earlier place no longer holds.
    """

    packed: Packed
    pages: list[int]
    where: torch.Tensor
    columns: dict[int, list[int]]
    pins: int = 0
    placed: int = field(default_factory=lambda: next(_placements))


@dataclass(eq=False)
class Lease:
    """Pages promised to one request."""

    owner: str
    promised: int
    pages: list[int] = field(default_factory=list)


class Memory:
    """The pool with its tenants."""

    def __init__(self, pool: Pool, layout: Layout) -> None:
        self.pool, self.layout = pool, layout
        self.residents: OrderedDict[str, Resident] = OrderedDict()
        self.leases: dict[str, Lease] = {}
        self.evictions = 0

    @property
    def promised(self) -> int:
        """Pages that are in use or may be asked for by what runs."""
        pinned = sum(len(found.pages) for found in self.residents.values() if found.pins)
        return pinned + sum(lease.promised for lease in self.leases.values())

    def size(self, packed: Packed) -> int:
        """Pages of an adapter without its bank."""
        return packed.pages(self.pool.page, self.layout.block)

    def total(self, packed: Packed | None) -> int:
        """Pages of an adapter with its bank; 0 for the bare base."""
        return sum(self.size(part) for part in _parts(packed))

    def missing(self, packed: Packed | None) -> int:
        """Pages that would have to be promised to use an adapter now."""
        return sum(self.size(part) for part in _parts(packed) if not self._pinned(part.key))

    def fits(self, packed: Packed | None, pages: int) -> bool:
        """Whether an adapter and so many pages of tokens can be promised now."""
        return self.promised + self.missing(packed) + pages <= self.pool.pages

    def admit(self, owner: str, packed: Packed | None, pages: int) -> None:
        """Promise a request its pages, and put its adapter into the pool for as long as it runs.

        Raises:
            PoolFull: `fits` says no.
        """
        if not self.fits(packed, pages):
            needed = self.missing(packed) + pages
            raise PoolFull(f"{needed} pages cannot be promised to {owner}, of {self.pool.pages}", owner)
        for part in _parts(packed):
            self._pin(part)
        self.leases[owner] = Lease(owner, pages)

    def grow(self, owner: str, count: int) -> list[int]:
        """So many more of the pages promised to a request."""
        lease = self.leases[owner]
        if len(lease.pages) + count > lease.promised:
            raise SurgeonError(f"{owner} was promised {lease.promised} pages and asks for more")
        self._make_room(count)
        taken = self.pool.take(count, owner)
        self.pool.clear(taken)
        lease.pages += taken
        return taken

    def release(self, owner: str, packed: Packed | None) -> None:
        """A request is done: its pages are free, and its adapter is in use once less."""
        lease = self.leases.pop(owner)
        self.pool.give_back(lease.pages, owner)
        for part in _parts(packed):
            found = self.residents[part.key]
            found.pins -= 1
            self.residents.move_to_end(part.key)

    def prefetch(self, packed: Packed) -> bool:
        """Put an adapter where there is room that nobody has; False if there is too little."""
        absent = [part for part in _parts(packed) if part.key not in self.residents]
        if sum(map(self.size, absent)) > self.pool.free:
            return False
        for part in absent:
            self._place(part)
        return True

    def drop(self, key: str) -> bool:
        """Take an idle adapter out of the pool (it was unloaded, or its files changed); False while it is in use."""
        found = self.residents.get(key)
        if found is None:
            return True
        if found.pins:
            return False
        self._evict(key)
        return True

    def _pinned(self, key: str) -> bool:
        return key in self.residents and self.residents[key].pins > 0

    def _pin(self, packed: Packed) -> None:
        if packed.key in self.residents:
            self.residents[packed.key].pins += 1
            self.residents.move_to_end(packed.key)
            return
        self._make_room(self.size(packed))
        self._place(packed).pins = 1

    def _make_room(self, count: int) -> None:
        while self.pool.free < count:
            idle = next((key for key, found in self.residents.items() if not found.pins), None)
            if idle is None:
                raise PoolFull(f"{count} pages are needed, {self.pool.free} are free, and nothing is idle")
            self._evict(idle)
            self.evictions += 1

    def _evict(self, key: str) -> None:
        self.pool.give_back(self.residents.pop(key).pages, key)

    def _place(self, packed: Packed) -> Resident:
        """Copy an adapter into free pages."""
        # Rows that are neighbours are read without a copy.
        pages = sorted(self.pool.take(self.size(packed), packed.key))
        left = list(pages)
        columns = {}
        for number, learned in packed.columns.items():
            blocks = self.layout.blocks(learned.k.shape[1])
            columns[number] = [left.pop() for _ in range(blocks)]
            self._write_columns(number, columns[number], learned.k, learned.v)
        places = self.pool.room(left, packed.widths)
        for width, rows in packed.rows.items():
            self.pool.rows(width)[places[width]] = rows.to(self.pool.data.device)
        where = torch.tensor([place for found in places.values() for place in found], dtype=torch.int64)
        resident = Resident(packed, pages, where, columns)
        self.residents[packed.key] = resident
        return resident

    def _write_columns(self, number: int, pages: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        site, block = self.layout.attentions[number], self.layout.block
        views = kv_views(self.pool.data, self.pool.page, block, (site.heads, site.inp, site.out))
        self.pool.clear(pages)
        for view, learned in zip(views, (k, v), strict=True):
            rows = learned.transpose(0, 1)
            for position, page in enumerate(pages):
                part = rows[position * block : (position + 1) * block]
                view[page, : len(part)] = part.to(view)


def _parts(packed: Packed | None) -> list[Packed]:
    """An adapter and its bank."""
    if packed is None:
        return []
    return [packed] if packed.bank is None else [packed.bank, packed]
