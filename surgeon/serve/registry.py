"""The adapters a server knows by name: folders on disk, the most recently used of them in the host's memory."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon import manifest, peft_files, store
from surgeon.errors import SurgeonError, UsageError
from surgeon.serve.adapters import Loader
from surgeon.serve.packed import Packed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:+-]{0,127}")
_FILES = (manifest.FILE, peft_files.CONFIG)
# A save of several adapters writes the manifest anew, whatever subfolders they are in.
_WRITTEN = (*_FILES, peft_files.WEIGHTS, store.OWN_WEIGHTS)


class UnknownAdapter(SurgeonError):
    """There is no adapter of this name."""


@dataclass(frozen=True)
class Entry:
    """An adapter by name.

    Attributes:
        name: what requests call it.
        path: its folder.
        rank: the rank it is served at, where it has every rank (DyLoRA); None for its highest.
        version: another one whenever its files have changed.
        created: when it was added, seconds since 1970.
        watched: whether a watched folder brought it, and takes it away again.
    """

    name: str
    path: Path
    rank: int | None
    version: str
    created: int
    watched: bool = False

    @property
    def key(self) -> str:
        """Its name in the pool."""
        return f"{self.name} {self.version}"


class Registry:
    """Names of adapters, and a cache of what was read; may be used from any thread."""

    def __init__(self, loader: Loader, *, reserved: Sequence[str], host_bytes: int, page_limit: int) -> None:
        """Start empty.

        Args:
            loader: reads folders.
            reserved: names of the base model, which no adapter may have.
            host_bytes: how much of what was read is kept in the host's memory.
            page_limit: pages of the pool; an adapter that needs more is refused.
        """
        self.loader, self.reserved, self.host_bytes, self.page_limit = loader, tuple(reserved), host_bytes, page_limit
        self._entries: dict[str, Entry] = {}
        self._cache: OrderedDict[str, Packed] = OrderedDict()
        self._failed: dict[str, SurgeonError] = {}
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def entries(self) -> list[Entry]:
        """All adapters, by name."""
        with self._lock:
            return [self._entries[name] for name in sorted(self._entries)]

    def entry(self, name: str) -> Entry:
        """The adapter of a name; raises UnknownAdapter."""
        with self._lock:
            found = self._entries.get(name)
        if found is None:
            raise UnknownAdapter(f"no model or adapter is called {name!r}", "model", "GET /v1/models lists them")
        return found

    def add(self, name: str, path: str | Path, rank: int | None = None, *, watched: bool = False) -> Entry:
        """Give a folder a name; it is read when it is first asked for, see `get`.

        Raises:
            UsageError: the name cannot be one, or is taken by another folder, or there is no adapter in the folder.
        """
        if not _NAME.fullmatch(name) or ".." in name:
            hint = "letters, digits and . _ - + @ :, at most 128, the first a letter or digit"
            raise UsageError(f"{name[:80]!r} cannot be the name of an adapter", "lora_name", hint)
        if name in self.reserved:
            raise UsageError(f"{name!r} is the base model's name", "lora_name", "choose another")
        folder = Path(path)
        if not any((folder / file).is_file() for file in _FILES):
            raise UsageError("there is no adapter in the folder", str(folder), f"one with {' or '.join(_FILES)}")
        made = Entry(name, folder, rank, version(folder, rank), int(time.time()), watched)
        with self._lock:
            known = self._entries.get(name)
            if known is not None and (known.path, known.rank) != (folder, rank):
                raise UsageError(f"{name!r} is loaded already, from {known.path}", "lora_name", "unload it first")
            if known is None or known.version != made.version:
                self._entries[name] = made
            return self._entries[name]

    def remove(self, name: str) -> Entry:
        """Forget an adapter; who uses it may go on. Raises UnknownAdapter."""
        found = self.entry(name)
        with self._lock:
            self._entries.pop(name, None)
            self._cache.pop(found.key, None)
            self._failed.pop(found.key, None)
        return found

    def get(self, name: str) -> Packed:
        """An adapter's rows, from the host's memory or from disk.

        Raises:
            UnknownAdapter: no adapter has this name.
            SurgeonError: it cannot be served; the keys are named.
        """
        entry = self.entry(name)
        with self._lock:
            if entry.key in self._failed:
                raise self._failed[entry.key]
            if entry.key in self._cache:
                self._cache.move_to_end(entry.key)
                return self._cache[entry.key]
        with self._reading:
            return self._cached(entry.key) or self._read(entry)

    def _cached(self, key: str) -> Packed | None:
        with self._lock:
            return self._cache.get(key)

    def _read(self, entry: Entry) -> Packed:
        try:
            packed = self.loader.load(entry.path, entry.key, entry.rank)
            self._check_size(packed, entry)
        except SurgeonError as error:
            with self._lock:
                self._failed[entry.key] = error
            raise
        with self._lock:
            self._cache[entry.key] = packed
            total = sum(kept.nbytes for kept in self._cache.values())
            while total > self.host_bytes and len(self._cache) > 1:
                total -= self._cache.popitem(last=False)[1].nbytes
        return packed

    def _check_size(self, packed: Packed, entry: Entry) -> None:
        layout, page = self.loader.layout, self.loader.layout.page
        parts = [packed] if packed.bank is None else [packed.bank, packed]
        needed = sum(part.pages(page, layout.block) for part in parts) + layout.pages(layout.block)
        if needed > self.page_limit:
            what = f"the adapter needs {needed} pages of the pool, which has {self.page_limit}: its rank is too high"
            raise UsageError(what, str(entry.path), "start the server with a larger --pool")

    def cached(self) -> tuple[int, int]:
        """How many adapters are in the host's memory, and their bytes."""
        with self._lock:
            return len(self._cache), sum(packed.nbytes for packed in self._cache.values())

    def scan(self, folder: Path) -> tuple[list[str], list[str], list[str]]:
        """Bring the names of a watched folder up to date: every subfolder with an adapter is one, under its name.

        Returns:
            Names that are new or changed, names that are gone, and what cannot be served, in words.
        """
        found = {
            place.name: place for place in sorted(folder.iterdir()) if place.is_dir() and _NAME.fullmatch(place.name)
        }
        found = {name: place for name, place in found.items() if any((place / file).is_file() for file in _FILES)}
        before = {entry.name: entry for entry in self.entries()}
        fresh, wrong = [], []
        for name, place in found.items():
            try:
                made = self.add(name, place, watched=True)
            except SurgeonError as error:
                wrong.append(f"{name}: {error.what}")
                continue
            if before.get(name) is None or before[name].version != made.version:
                fresh.append(name)
        mine = [entry for entry in before.values() if entry.watched and entry.path.parent == folder]
        gone = [entry.name for entry in mine if entry.name not in found]
        for name in gone:
            self.remove(name)
        return fresh, gone, wrong


def version(folder: Path, rank: int | None) -> str:
    """Another string whenever an adapter's files have changed."""
    found = []
    for name in _WRITTEN:
        with contextlib.suppress(OSError):
            told = (folder / name).stat()
            found.append((told.st_mtime_ns, told.st_size))
    newest, size = max((time for time, _ in found), default=0), sum(size for _, size in found)
    return f"{newest:x}.{size:x}" + (f".r{rank}" if rank is not None else "")
