"""The pool and its tenants under random traffic: nothing overlaps, nothing leaks, nothing in use is freed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from surgeon.errors import SurgeonError
from surgeon.normal import Columns
from surgeon.serve.layout import Layout, kv_views
from surgeon.serve.memory import Memory
from surgeon.serve.packed import WIDTH, Packed, Packer
from surgeon.serve.pool import Pool, PoolFull, pages_for
from surgeon.sites import ATTENTION, Site

ATTENTIONS = (
    Site("a", ATTENTION, "", "a", inp=4, out=3, heads=2),
    Site("b", ATTENTION, "", "b", inp=2, out=4, heads=2),
)
LAYOUT = Layout(ATTENTIONS, (), 4, 64)
WIDTHS = (32, 24, 8, 7, 5, 1)


@given(st.lists(st.tuples(st.sampled_from(WIDTHS), st.integers(0, 40)), unique_by=lambda pair: pair[0]), st.randoms())
@settings(max_examples=60, deadline=None)
def test_rows_find_room_in_any_pages(widths: list[tuple[int, int]], random: object) -> None:
    widths = sorted(widths, reverse=True)
    pool = Pool(400, 64)
    order = list(range(400))
    random.shuffle(order)  # type: ignore[attr-defined]
    pages = order[: pages_for(widths, 64)]
    places = pool.room(pages, widths)
    seen: set[int] = set()
    for width, count in widths:
        assert len(places[width]) == count
        for number in places[width]:
            cells = range(number * width, (number + 1) * width)
            assert {cell // 64 for cell in cells} <= set(pages)
            assert len({cell // 64 for cell in cells}) == 1
            assert seen.isdisjoint(cells)
            seen.update(cells)


def packed(key: str, seed: int, bank: Packed | None = None) -> Packed:
    """Random rows of random widths, and sometimes learned columns; `seed` says which."""
    generator = torch.Generator().manual_seed(seed)
    packer = Packer(torch.float32)
    for width in WIDTHS[seed % 3 :: 2]:
        packer.add(torch.randn(1 + seed % 5, width, generator=generator))
    columns = {}
    if seed % 3 == 0:
        for number, site in enumerate(ATTENTIONS):
            shape = (site.heads, 1 + seed % 6)
            made = (torch.randn(*shape, size, generator=generator) for size in (site.inp, site.out))
            columns[number] = Columns(*made)
    return Packed(key, packer.rows(), torch.zeros(0, WIDTH), torch.zeros(0), bank, columns)


class Traffic(RuleBasedStateMachine):
    """Requests come, grow and go; adapters are fetched ahead, dropped and thrown out."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(Pool(48, LAYOUT.page), LAYOUT)
        self.bank = packed("bank", 4)
        self.adapters = [packed(f"adapter {i}", i, self.bank if i % 4 == 1 else None) for i in range(12)]
        self.running: dict[str, tuple[Packed | None, int, list[tuple[int, float]]]] = {}
        self.count = 0

    @rule(which=st.integers(-1, 11), pages=st.integers(0, 12))
    def arrive(self, which: int, pages: int) -> None:
        adapter = self.adapters[which] if which >= 0 else None
        self.count += 1
        owner = f"request {self.count}"
        if self.memory.fits(adapter, pages):
            self.memory.admit(owner, adapter, pages)
            self.running[owner] = (adapter, pages, [])
        else:
            with pytest.raises(PoolFull):
                self.memory.admit(owner, adapter, pages)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.running)))
        _, promised, held = self.running[owner]
        count = data.draw(st.integers(0, promised - len(held)))
        for page in self.memory.grow(owner, count):
            value = float(len(held) + 1)
            self.memory.pool.data.view(-1, LAYOUT.page)[page] = value
            held.append((page, value))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.running)))
        self.memory.release(owner, self.running.pop(owner)[0])

    @rule(which=st.integers(0, 11))
    def prefetch(self, which: int) -> None:
        before = set(self.memory.residents)
        self.memory.prefetch(self.adapters[which])
        assert before <= set(self.memory.residents)

    @rule(which=st.integers(0, 11))
    def drop(self, which: int) -> None:
        key = self.adapters[which].key
        used = any(adapter is self.adapters[which] for adapter, _, _ in self.running.values())
        assert self.memory.drop(key) is not used
        assert (key in self.memory.residents) is used

    @invariant()
    def nothing_overlaps_and_nothing_leaks(self) -> None:
        memory, pool = self.memory, self.memory.pool
        held = [page for found in memory.residents.values() for page in found.pages]
        held += [page for lease in memory.leases.values() for page in lease.pages]
        assert len(held) == len(set(held))
        assert pool.free + len(held) == pool.pages
        assert sum(pool.usage().values()) == len(held)
        assert memory.promised <= pool.pages

    @invariant()
    def what_is_in_use_is_whole(self) -> None:
        memory = self.memory
        for adapter, _, held in self.running.values():
            for page, value in held:
                assert bool((memory.pool.data.view(-1, LAYOUT.page)[page] == value).all())
            if adapter is not None:
                assert memory.residents[adapter.key].pins > 0
        for found in memory.residents.values():
            start = 0
            for width, rows in found.packed.rows.items():
                places = found.where[start : start + len(rows)]
                assert torch.equal(memory.pool.rows(width)[places], rows)
                start += len(rows)
            for number, pages in found.columns.items():
                site, learned = ATTENTIONS[number], found.packed.columns[number]
                views = kv_views(memory.pool.data, LAYOUT.page, LAYOUT.block, (site.heads, site.inp, site.out))
                for view, wanted in zip(views, (learned.k, learned.v), strict=True):
                    assert torch.equal(view[pages].flatten(0, 1)[: wanted.shape[1]].transpose(0, 1), wanted)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def test_a_page_has_one_owner() -> None:
    pool = Pool(3, 8)
    pages = pool.take(2, "one")
    with pytest.raises(SurgeonError, match="not its own"):
        pool.give_back(pages, "two")
    with pytest.raises(PoolFull, match="2 pages are needed and 1 are free"):
        pool.take(2, "two")
    pool.give_back(pages, "one")
    assert pool.free == 3
    with pytest.raises(SurgeonError, match="does not fit"):
        pages_for([(9, 1)], 8)
