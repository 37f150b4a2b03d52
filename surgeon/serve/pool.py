"""One allocation for everything that comes and goes: K/V pages, rows of adapters, prefixes (S-LoRA, unified paging).

The pool is one tensor of numbers, cut into pages of equal size. Whoever takes pages gets any that are free: neighbours
are not needed, so nothing fragments. Matrices are kept row by row. A row of width w lies at a multiple of w, so that
`rows(w)`, a view of the whole pool, has it as one of its rows, and operators that take row numbers find rows of any
width without a copy.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

from surgeon.errors import SurgeonError, UsageError


class PoolFull(SurgeonError):
    """There are fewer free pages than asked for."""


class Pool:
    """Pages of numbers, and who has them.

    Attributes:
        data: all numbers `[pages · page]`.
        pages: how many pages there are.
        page: numbers per page.
    """

    def __init__(
        self, pages: int, page: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        if pages <= 0 or page <= 0:
            raise UsageError(f"a pool of {pages} pages of {page} numbers holds nothing", "--pool", "more memory")
        self.data = _zeros(pages * page, dtype, torch.device(device))
        self.pages, self.page = pages, page
        self._free = list(range(pages - 1, -1, -1))
        self._owners: dict[int, str] = {}

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of the allocation."""
        return self.data.numel() * self.data.element_size()

    def take(self, count: int, owner: str) -> list[int]:
        """Give `count` free pages to an owner.

        Raises:
            PoolFull: there are fewer.
        """
        if count > len(self._free):
            raise PoolFull(f"{count} pages are needed and {len(self._free)} are free", owner, "a larger --pool")
        taken = [self._free.pop() for _ in range(count)]
        self._owners.update(dict.fromkeys(taken, owner))
        return taken

    def give_back(self, pages: Sequence[int], owner: str) -> None:
        """Pages of an owner are free again.

        Raises:
            SurgeonError: one of them is not the owner's.
        """
        foreign = [number for number in pages if self._owners.get(number) != owner]
        if foreign or len(set(pages)) != len(pages):
            raise SurgeonError(f"{owner} gives back pages that are not its own: {foreign[:3] or list(pages)[:3]}")
        for number in pages:
            del self._owners[number]
        self._free.extend(pages)

    def owner(self, number: int) -> str:
        """Who has a page, "" for nobody."""
        return self._owners.get(number, "")

    def usage(self) -> dict[str, int]:
        """Owner → number of its pages."""
        counts: dict[str, int] = {}
        for name in self._owners.values():
            counts[name] = counts.get(name, 0) + 1
        return counts

    def clear(self, pages: Sequence[int]) -> None:
        """Zeros in pages whose numbers are read before all of them are written (keys behind a mask)."""
        if pages:
            self.data.view(self.pages, self.page)[list(pages)] = 0

    def rows(self, width: int) -> torch.Tensor:
        """The pool as rows of a width `[n, width]`; what does not fill a row at the end is left out."""
        count = self.data.numel() // width
        return self.data[: count * width].view(count, width)

    def room(self, pages: Sequence[int], widths: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
        """Where rows go in pages: width → numbers of its rows in `rows(width)`.

        Args:
            pages: at least `pages_for(widths, self.page)` of them.
            widths: (width, number of rows) each, widest first.
        """
        places: dict[int, list[int]] = {width: [] for width, _ in widths}
        left = list(pages)
        start = end = 0
        for width, count in widths:
            while len(places[width]) < count:
                first = -(-start // width) * width
                if first + width > end:
                    start = left.pop(0) * self.page
                    end = start + self.page
                    continue
                fitting = min((end - first) // width, count - len(places[width]))
                places[width] += range(first // width, first // width + fitting)
                start = first + fitting * width
        return places


def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; in the host's memory over huge pages where the system has them.

    A step reads rows of many adapters from all over the pool, and the lookup of a page costs as much as its numbers.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype, device=device)
    size = math.ceil(count * dtype.itemsize / mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count)


def pages_for(widths: Sequence[tuple[int, int]], page: int) -> int:
    """Pages that rows need wherever these lie: a row never crosses from one page into the next.

    Raises:
        UsageError: a row is wider than a page has room for.
    """
    taken, left = 0, 0
    for width, count in widths:
        waste = 0 if page % width == 0 else width - 1
        if count and page - waste < width:
            raise UsageError(f"a row of {width} numbers does not fit into pages of {page}", "--page", "a larger page")
        while count:
            fitting = min(count, max(0, (left - waste) // width))
            count -= fitting
            left -= fitting * width + (waste if fitting else 0)
            if count:
                taken, left = taken + 1, page
    return taken
