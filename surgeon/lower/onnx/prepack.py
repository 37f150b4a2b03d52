"""`surgeon prepack`: an export as this machine's ONNX Runtime wants it, optimised once instead of at every start.

ONNX Runtime optimises a graph and rearranges ("prepacks") weights for the processor's matrix kernels whenever it loads
a model. Both can be saved: the optimised model, with the rearranged weights beside the original ones in one file, so
twice the size on disk. What is saved holds for one version of ONNX Runtime on one kind of processor.

The other way to start fast is to leave the weights as they are: `session.disable_prepacking` = "1" maps the files and
reads a weight where it lies, so that processes share it; every step is then slower (`benchmarks/onnx/load.py`).
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from surgeon.atomic import atomic_folder, check_target
from surgeon.errors import UnsupportedError, UsageError
from surgeon.lower.onnx.files import FOLDER, MANIFEST, MODEL, check_files, files_of, models, records
from surgeon.lower.onnx.session import machine
from surgeon.lower.onnx.verify import Verified, read_record, verify

DATA = "prepacked.onnx_data"
FAST_START = {"session.disable_prepacking": "1"}
"""Session options for a fast start and shared memory, at the price of slower steps."""
_SMALLEST = 1024


@dataclass(frozen=True)
class Prepacked:
    """What was made.

    Attributes:
        folder: where it is.
        files: name → bytes.
        machine: what it holds for.
        verified: its probes, replayed.
        seconds: time taken.
    """

    folder: Path
    files: dict[str, int]
    machine: dict[str, str]
    verified: Verified | None
    seconds: float


def prepack(folder: Path, out: Path, *, overwrite: bool = False) -> Prepacked:
    """Write an export in the form this machine loads fastest, and replay its probes.

    Args:
        folder: an ONNX export.
        out: the new folder.
        overwrite: replace an existing one.

    Raises:
        UsageError: it is no export, a file of it is damaged, it is prepacked already, or made for another runtime.
        UnsupportedError: this ONNX Runtime cannot load it.
        CheckFailed: the result computes something else; nothing is left behind.
    """
    began = time.perf_counter()
    record = read_record(folder)
    check_target(out, overwrite)
    check_files(folder, record["files"])
    if "prepacked" in record:
        raise UsageError("the export is prepacked already", str(folder), "prepack what it was made from")
    if record.get("profile") == "web":
        raise UsageError("browsers cannot read prepacked weights", str(folder), "export it with --profile ort or genai")
    need = 2 * sum(entry["bytes"] for entry in record["files"].values())
    with atomic_folder(out, overwrite=overwrite, need=need) as new:
        for name in models(record):
            _save(folder / name, new)
        _carry(folder, new, record)
        record["prepacked"] = machine()
        record["files"] = records(new)
        (new / MANIFEST).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        verified = verify(new) if record.get("verified") else None
        if verified is not None:
            verified.require(str(out))
        files = {path.relative_to(new).as_posix(): path.stat().st_size for path in files_of(new)}
    return Prepacked(out, files, machine(), verified, time.perf_counter() - began)


def data_of(model: str) -> str:
    """The file of a prepacked model's weights."""
    return DATA if model == MODEL else f"{Path(model).stem}_{DATA}"


def _save(model: Path, new: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(new / model.name)
    for key, value in {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": data_of(model.name),
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_SMALLEST),
    }.items():
        options.add_session_config_entry(key, value)
    try:
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding's own classes, one per status code
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"ONNX Runtime: {reason}", str(model), "surgeon verify says what is wrong") from error


def _carry(folder: Path, new: Path, record: dict[str, Any]) -> None:
    """Copy what belongs to the export and is neither its model nor its weights."""
    # model.onnx, and the file of its own tensors, whose name begins alike
    weights = (f"{FOLDER}/", MODEL, *models(record))
    kept = [name for name in record["files"] if not name.startswith(weights)]
    for name in kept:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, new / name)
