"""Tensors streamed from a checkpoint into a new safetensors file, in bounded memory.

What stays is copied as bytes inside the kernel; what changes passes through two reused buffers, block of rows by block
of rows: stored dtype → fp32 → the change → rounded once → written.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon.errors import CheckFailed, UsageError
from surgeon.safetensors_file import TensorInfo

# Small enough to stay in cache, and for malloc to hand out the same pages again; large enough for fast products.
BLOCK_BYTES = 16 << 20
_COPY_BYTES = 256 << 20
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

RowDelta = Callable[[torch.Tensor, slice], torch.Tensor]
"""`delta(weight, rows) -> merged`: fp32 rows `rows` (along dimension 0) of the stored tensor, and what becomes of them.

The block is the callback's to change in place. Only very large tensors come in more than one block.
"""


@dataclass(frozen=True)
class WholeDelta:
    """A change that needs the whole tensor at once, e.g. a norm along dimension 0: `merge(weight) -> merged`, fp32."""

    merge: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """`rows` is always the whole tensor."""
        return self.merge(weight)


Delta = RowDelta | WholeDelta


@dataclass(frozen=True)
class Entry:
    """One tensor of an output file: its bytes come from `source`, through `delta` if there is one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: TensorInfo | torch.Tensor
    delta: Delta | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def raw(self) -> bool:
        """Whether the stored bytes are copied as they are."""
        return isinstance(self.source, TensorInfo) and self.delta is None and self.source.dtype == self.dtype


class Buffers:
    """Memory that is allocated once and grows to the largest block."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._turn = 0

    def take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; it is overwritten by the next `take` of the same role."""
        size = math.prod(shape) * dtype.itemsize
        if role not in self._kept or self._kept[role].numel() < size:
            self._kept.pop(role, None)
            self._kept[role] = torch.empty(size, dtype=torch.uint8)
        return self._kept[role][:size].view(dtype).view(shape)

    def alternate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """One of two tensors in turn: one is still being written while the next is computed."""
        self._turn = 1 - self._turn
        return self.take(f"written {self._turn}", shape, dtype)


def write_entries(
    file: Path, header: bytes, entries: Iterable[Entry], buffers: Buffers, wrote: Callable[[Entry, int], None]
) -> None:
    """Write a safetensors file; `wrote(entry, bytes)` is called as its parts are done.

    Raises CheckFailed if a changed tensor is not finite in its stored dtype, UsageError if a source is cut short.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_core_for_writing())
        sink = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        stack.callback(os.close, sink)
        handles: dict[Path, int] = {}

        def handle(path: Path) -> int:
            if path not in handles:
                handles[path] = os.open(path, os.O_RDONLY)
                stack.callback(os.close, handles[path])
            return handles[path]

        writer = stack.enter_context(_Writer())
        writer.then(_write, sink, memoryview(header))
        for entry in entries:
            if isinstance(entry.source, torch.Tensor):
                writer.then(_write, sink, _bytes(entry.source.detach().to(entry.dtype).contiguous()))
            elif entry.raw:
                writer.then(_copy, handle(entry.source.file), sink, entry.source)
            else:
                for block in _changed(entry, entry.source, handle(entry.source.file), buffers):
                    writer.then(_write, sink, _bytes(block))
            wrote(entry, entry.nbytes)
        writer.finish()


@contextlib.contextmanager
def _core_for_writing() -> Iterator[None]:
    # Threads of a computation wait for each other: if the writer takes the core of one, all of them stand still.
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Writer:
    """Writes in order while the next block is computed; one write is under way at most, so two buffers suffice."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def then(self, function: Callable[..., None], *arguments: Any) -> None:
        self.finish()
        self._pending = self._pool.submit(function, *arguments)

    def finish(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _changed(entry: Entry, source: TensorInfo, handle: int, buffers: Buffers) -> Iterator[torch.Tensor]:
    """The output tensor in blocks of rows, each rounded once to its stored dtype."""
    wide = torch.promote_types(torch.promote_types(source.dtype, entry.dtype), torch.float32)
    shape = source.shape or (1,)
    row = math.prod(shape[1:])
    blocks = math.ceil(shape[0] * row * wide.itemsize / BLOCK_BYTES)
    if isinstance(entry.delta, WholeDelta) or not source.shape:
        blocks = 1
    # Blocks of equal height: a last block of few rows would take another code path in the matrix product.
    step = max(1, math.ceil(shape[0] / max(1, blocks)))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        block = (rows.stop - rows.start, *shape[1:]) if source.shape else ()
        stored = buffers.take("stored", block, source.dtype)
        _read(handle, source, start * row * source.dtype.itemsize, _bytes(stored), entry.name)
        value = buffers.take("wide", block, wide).copy_(stored)
        merged = value if entry.delta is None else entry.delta(value, rows)
        if tuple(merged.shape) != block:
            raise UsageError(
                f"the change of {entry.name} gave {list(merged.shape)} for {list(block)}",
                f"rows {rows.start} to {rows.stop}",
                "the adapter belongs to another base",
            )
        yield _rounded(entry, merged, buffers.alternate(block, entry.dtype))


def _rounded(entry: Entry, merged: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    rounded.copy_(merged)
    # The norm bounds every value and is the cheapest look at all of them; a closer look is hardly ever needed.
    flat = merged.reshape(-1)
    bounded = float(torch.dot(flat, flat)) ** 0.5 < torch.finfo(entry.dtype).max
    if not bounded and not torch.isfinite(rounded).all():
        finite = bool(torch.isfinite(merged).all())
        what = f"merged values of {entry.name} overflow {entry.dtype}" if finite else f"{entry.name} is not finite"
        hint = "merge into bfloat16 or float32" if finite else "check the adapter and the base for NaN and Inf"
        raise CheckFailed(what, "merge", hint)
    return rounded


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _write(sink: int, data: memoryview) -> None:
    while data.nbytes:
        data = data[os.write(sink, data) :]


def _read(handle: int, source: TensorInfo, offset: int, into: memoryview, name: str) -> None:
    position = source.start + offset
    while into.nbytes:
        count = os.preadv(handle, [into], position)
        if count == 0:
            raise UsageError(f"the file ended inside {name}", str(source.file), "it changed while it was read")
        into, position = into[count:], position + count


def _copy(handle: int, sink: int, source: TensorInfo) -> None:
    position = source.start
    try:
        while position < source.stop:
            count = os.copy_file_range(handle, sink, min(_COPY_BYTES, source.stop - position), offset_src=position)
            if count == 0:
                break
            position += count
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
    space = memoryview(bytearray(min(BLOCK_BYTES, source.stop - position)))
    while position < source.stop:
        part = space[: source.stop - position]
        _read(handle, source, position - source.start, part, source.name)
        _write(sink, part)
        position += len(part)
