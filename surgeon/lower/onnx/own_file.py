"""An export's own tensors: one safetensors file that its models point into, written one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from surgeon.safetensors_file import header_bytes

DTYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.int64: ir.DataType.INT64,
    torch.int32: ir.DataType.INT32, torch.bool: ir.DataType.BOOL, torch.float64: ir.DataType.DOUBLE,
    torch.int8: ir.DataType.INT8, torch.uint8: ir.DataType.UINT8, torch.bfloat16: ir.DataType.BFLOAT16,
}  # fmt: skip
INLINE = 1024
"""Bytes of a tensor that stays in the model."""


def write_own(models: Sequence[ir.Model], file: Path) -> int:
    """Write every tensor that is in memory or can be read, and is not small, and let the models point to it.

    What several models have is written once.

    Returns:
        The bytes written; 0 if there is no such tensor, and then no file either.
    """
    groups = _groups(models)
    # The largest alignment first: every tensor then begins at a multiple of its item size.
    groups.sort(key=lambda group: -_layout(group[0])[1].itemsize)
    if not groups:
        return 0
    header = header_bytes([_layout(group[0]) for group in groups])
    with file.open("wb") as stream:
        stream.write(header)
        for group in groups:
            tensor, start = group[0].const_value, stream.tell()
            assert tensor is not None
            stream.write(tensor.tobytes())
            for value in group:
                value.const_value = ir.ExternalTensor(
                    file.name, start, stream.tell() - start, tensor.dtype,
                    shape=ir.Shape(tensor.shape), name=str(value.name), base_dir=file.parent,
                )  # fmt: skip
        return stream.tell()


def _groups(models: Sequence[ir.Model]) -> list[list[ir.Value]]:
    """The tensors to write, each with all values that have it; of one name and other bytes a later one is renamed."""
    found: dict[str, list[ir.Value]] = {}
    for number, model in enumerate(models):
        for value in [value for value in model.graph.initializers.values() if _is_own(value)]:
            name = str(value.name)
            if name in found and not _same(found[name][0], value):
                name = value.name = f"{name}.{number}"
            found.setdefault(name, []).append(value)
    return list(found.values())


def _same(one: ir.Value, other: ir.Value) -> bool:
    if _layout(one) != _layout(other):
        return False
    first, second = one.const_value, other.const_value
    return first is not None and second is not None and first.tobytes() == second.tobytes()


def _is_own(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes > INLINE


def _layout(value: ir.Value) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """Name, dtype and shape in the file: packed types, which safetensors lacks, are bytes."""
    tensor = value.const_value
    assert tensor is not None
    known = next((dtype for dtype, kind in DTYPES.items() if kind == tensor.dtype), None)
    if known is None:
        return str(value.name), torch.uint8, (tensor.nbytes,)
    return str(value.name), known, tuple(int(size) for size in tensor.shape.numpy())
