"""What a launch in the interpreter is watched by: bands of NaN around every buffer, and programs in reverse order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from surgeon.kernels import jit

BAND = 1 << 14
"""Bytes before and after every buffer."""


def watched(call: jit.Call) -> None:
    """Interpret a call on copies of its buffers between bands of 0xFF bytes, NaN in every floating dtype.

    Raises:
        AssertionError: a band was written to.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in call.tensors}
    fenced = {address: _fenced(storage) for address, storage in storages.items()}
    arguments = {
        name: _moved(value, fenced[value.untyped_storage().data_ptr()]) if isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    with reverse_order():
        jit.interpret(jit.Call(call.kernel, arguments, call.constants, call.warps, call.stages))
    for address, storage in storages.items():
        band = torch.cat([fenced[address][:BAND], fenced[address][BAND + storage.nbytes() :]])
        assert (band == 0xFF).all(), f"{call.kernel.name} wrote outside of its tensors"
        inner = fenced[address][BAND : BAND + storage.nbytes()]
        torch.empty(0, dtype=torch.uint8).set_(storage)[:] = inner


def _fenced(storage: torch.UntypedStorage) -> torch.Tensor:
    buffer = torch.full((storage.nbytes() + 2 * BAND,), 0xFF, dtype=torch.uint8)
    buffer[BAND : BAND + storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)
    return buffer


def _moved(tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    offset = tensor.storage_offset() + BAND // tensor.itemsize
    inner = torch.empty(0, dtype=tensor.dtype)
    return inner.set_(buffer.untyped_storage(), offset, tensor.size(), tensor.stride())


@contextlib.contextmanager
def reverse_order() -> Iterator[None]:
    """Within it the interpreter runs the last program first: a result that depends on the order is wrong."""
    from triton.runtime.interpreter import interpreter_builder as builder

    def turned(x: int, y: int, z: int) -> None:
        grid = builder.grid_dim
        type(builder).set_grid_idx(builder, grid[0] - 1 - x, grid[1] - 1 - y, grid[2] - 1 - z)

    builder.set_grid_idx = turned
    try:
        yield
    finally:
        del builder.set_grid_idx


@pytest.fixture(autouse=True)
def watch() -> Iterator[None]:
    """Every launch of a test goes through `watched`, and new tensors are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    with jit.launcher(watched):
        yield
    torch.use_deterministic_algorithms(False)
