"""`manifest.json`: what an artifact is, which binaries it has, and the probes that tell whether it still computes that.

artifact/  manifest.json  program.json  weights.safetensors  tokenizer.json  kernels/<arch>/*.cubin  kernels/sm_80/*.ptx
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.safetensors_file import read_shard

FILE, PROGRAM, WEIGHTS, TOKENIZER, KERNELS = (
    "manifest.json", "program.json", "weights.safetensors", "tokenizer.json", "kernels",
)  # fmt: skip
SCHEMA = 1
AGAIN = "export the artifact again, or take an earlier copy of it"


@dataclass(frozen=True)
class Probe:
    """A prompt and what the model said to it.

    Attributes:
        prompt: ids.
        tokens: the greedy continuation.
        margins: by how much each token's logit exceeds the next.
    """

    prompt: list[int]
    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Manifest:
    """An artifact's record.

    Attributes:
        schema: version of this file's layout.
        dtype: of weights, cache and arithmetic.
        archs: architectures there are binaries for.
        kernels: an entry for each binary, see `surgeon.kernels.aot.Binary.record`, with its `file`, and `ptx` if any.
        program: sha256 of the program.
        weights: bytes of the weights' file.
        probes: prompts with their continuations.
        tolerance: a margin under which two tokens count as the same.
        stop: tokens that end a text.
        room: positions the model has, 0 for no limit.
        model: what it was made from, in words.
        passes: what was applied to it.
        versions: of surgeon, torch and triton, when it was built.
    """

    schema: int
    dtype: str
    archs: list[str]
    kernels: list[dict[str, Any]]
    program: str
    weights: int
    probes: list[Probe]
    tolerance: float
    stop: list[int] = field(default_factory=list)
    room: int = 0
    model: str = ""
    passes: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into an artifact."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The record of an artifact.

    Raises:
        UsageError: the file is missing or damaged.
        UnsupportedError: it was written by a newer surgeon.
    """
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"the folder has no {FILE}", str(folder), "surgeon export work/ --target triton makes one")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        schema = found["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{FILE} is damaged: {type(error).__name__} {error}", str(path), AGAIN) from error
    if not isinstance(schema, int) or schema > SCHEMA:
        what = f"the artifact has schema {schema}, this surgeon reads up to {SCHEMA}"
        raise UnsupportedError(what, str(path), "update surgeon: pip install -U model-surgeon")
    try:
        found["probes"] = [Probe(**probe) for probe in found["probes"]]
        return Manifest(**{one.name: found[one.name] for one in fields(Manifest) if one.name in found})
    except (KeyError, TypeError) as error:
        raise UsageError(f"{FILE} is damaged: {type(error).__name__} {error}", str(path), AGAIN) from error


def read_program(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """`program.json`, which is the one the manifest was written for."""
    path = folder / PROGRAM
    data = verified(path, manifest.program)
    try:
        found: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise UsageError(f"{PROGRAM} is damaged: {error}", str(path), AGAIN) from error
    return found


def verified(path: Path, sha256: str) -> bytes:
    """A file's bytes.

    Raises:
        UsageError: it is missing, or not the file that was written.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"the artifact lacks {path.name}", str(path), AGAIN) from error
    if digest(data) != sha256:
        what = f"{path.name} was changed after the export: its sha256 is not {sha256[:12]}…"
        raise UsageError(what, str(path), AGAIN)
    return data


def digest(data: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def check_weights(folder: Path, manifest: Manifest) -> None:
    """Raise UsageError unless the weights' file is there, whole and readable."""
    path = folder / WEIGHTS
    size = path.stat().st_size if path.is_file() else -1
    if size != manifest.weights:
        what = f"{WEIGHTS} is missing" if size < 0 else f"{WEIGHTS} has {size} of {manifest.weights} bytes"
        raise UsageError(what, str(path), "copy the artifact again")
    read_shard(path)


def require_memory(need: int, free: int, what: str, where: str) -> None:
    """Raise SurgeonError unless `need` bytes fit into `free`."""
    if need > free:
        sizes = f"{need / 2**30:.2f} GiB of GPU memory, and {free / 2**30:.2f} GiB are free"
        hint = "a shorter text or fewer prompts, a GPU with more, or --device cpu"
        raise SurgeonError(f"{what} takes {sizes}", where, hint)


def agreement(probe: Probe, tokens: list[int], tolerance: float) -> float:
    """Share of a probe's tokens that were found again; from the first tie on, which may fall either way, all count."""
    for step, (wanted, margin) in enumerate(zip(probe.tokens, probe.margins, strict=True)):
        if step >= len(tokens) or tokens[step] != wanted:
            tied = step < len(tokens) and margin <= tolerance
            return 1.0 if tied else step / max(1, len(probe.tokens))
    return 1.0 if math.isfinite(tolerance) else 0.0
