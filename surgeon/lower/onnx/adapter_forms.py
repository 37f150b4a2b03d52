"""The two forms of an adapter's file: what ONNX Runtime loads itself, and safetensors, which everything reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_VERSION = 1


def write_plain(tensors: Mapping[str, Array], version: int, path: Path) -> None:
    """As safetensors, with the export's version."""
    from safetensors.numpy import save_file

    values = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(values, path, metadata={"format": "surgeon-slots", "model_version": str(version)})


def write_native(tensors: Mapping[str, Array], version: int, path: Path) -> None:
    """As an `.onnx_adapter`, with the export's version."""
    import onnxruntime  # an export that writes no adapter does without its memory

    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(_VERSION)
    made.set_model_version(version)
    values = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    made.set_parameters({n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in values.items()})
    made.export_adapter(str(path))


def read_native(path: Path) -> tuple[dict[str, Array], int]:
    """The tensors and the version."""
    import onnxruntime

    found = onnxruntime.AdapterFormat.read_adapter(str(path))
    # The values point into the file, which is closed with the reader.
    return {name: value.numpy().copy() for name, value in found.get_parameters().items()}, found.get_model_version()


def read_plain(path: Path) -> tuple[dict[str, Array], int]:
    """The tensors and the version, read by hand: an export is verified where the package safetensors is not."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8:begin])
    metadata = header.pop("__metadata__", {})
    tensors = {name: _tensor(memoryview(data)[begin:], entry) for name, entry in header.items()}
    return tensors, int(metadata.get("model_version", -1))


def _tensor(data: memoryview, entry: Mapping[str, Any]) -> Array:
    start, stop = entry["data_offsets"]
    kind = {"F32": np.float32, "F16": np.float16}[entry["dtype"]]
    values: Array = np.frombuffer(data[start:stop], kind) if stop > start else np.empty(0, kind)
    return values.reshape(entry["shape"])
