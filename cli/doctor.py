"""`surgeon doctor`: is this machine ready, and if not, what is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from surgeon.cli import output
from surgeon.errors import CheckFailed, SurgeonError

if TYPE_CHECKING:
    from importlib.metadata import Distribution

DISTRIBUTION = "model-surgeon"
EXTRAS = ("onnx", "onnxruntime", "onnxscript", "onnx-ir", "triton", "peft")
LEAST_DISK = 2e9  # bytes: a small model, its merge and its export
LEAST_MEMORY = 2e9  # bytes: torch, transformers and a small model

Status = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Check:
    """One finding: `note` is something only part of surgeon needs, `fail` stops all of it."""

    name: str
    status: Status
    found: str
    hint: str = ""


def command(
    json: output.Json = False,
    probe: Annotated[bool, typer.Option(help="Also capture and run a random two-layer Llama (a few seconds).")] = True,
) -> None:
    """Check versions, devices, memory and disk, and whether a tiny model captures and runs.

    Exits with 1 if something surgeon cannot work without is missing.

    Examples:
        surgeon doctor
        surgeon doctor --no-probe --json
    """
    checks = [python(), *packages(), *devices(), disk(), memory()]
    if probe and not any(check.status == "fail" for check in checks):
        checks.append(capture())
    failed = [check for check in checks if check.status == "fail"]
    rows = [(check.status, check.name, check.found, check.hint) for check in checks]
    emit = {"ok": not failed, "platform": platform.platform(), "checks": checks}
    output.emit(emit, json, output.table("", ("", "check", "found", "try"), rows))
    if failed:
        raise CheckFailed(f"{failed[0].name}: {failed[0].found}", "surgeon doctor", failed[0].hint)


def python() -> Check:
    """The interpreter against the distribution's Requires-Python."""
    installed = _distribution()
    wanted = str(installed.metadata["Requires-Python"]) if installed else ">=3.10"
    found = platform.python_version()
    return _versioned("python", found, wanted, required=True, install=f"a Python {wanted}")


def packages() -> Iterator[Check]:
    """Every requirement of the distribution, then the packages of its extras and those some features use."""
    from packaging.requirements import Requirement

    installed = _distribution()
    requirements = [Requirement(line) for line in (installed.requires or [])] if installed else []
    if not installed:
        yield Check(DISTRIBUTION, "note", "not installed: versions are not checked", "pip install -e . in the clone")
    ranges: dict[str, str] = {}
    for requirement in requirements:
        ranges.setdefault(requirement.name, str(requirement.specifier))
        if requirement.marker is None:
            yield _package(requirement.name, str(requirement.specifier), required=True)
    for name in EXTRAS:
        yield _package(name, ranges.get(name, ""), required=False)


def devices() -> Iterator[Check]:
    """The processor, and the graphics cards torch can use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("cpu", "ok", f"{platform.machine()}, {cores} cores")
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        yield Check("cuda", "note", "none: everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield Check("cuda", "ok", f"{card.name}, {output.size(card.total_memory)}, compute {card.major}.{card.minor}")


def disk() -> Check:
    """Free space where outputs go by default."""
    free = shutil.disk_usage(Path.cwd()).free
    hint = "" if free >= LEAST_DISK else "free some space, or give -o on another disk"
    return Check("disk", "note" if hint else "ok", f"{output.size(free)} free here", hint)


def memory() -> Check:
    """Memory the system says is available; total memory where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hint = "" if available >= LEAST_MEMORY else "close other programs"
    return Check("memory", "note" if hint else "ok", f"{output.size(available)} available", hint)


def capture() -> Check:
    """A random two-layer Llama, captured and run, against transformers' own logits."""
    name, start = "capture", time.perf_counter()
    if importlib.util.find_spec("surgeon.capture") is None:
        return Check(name, "fail", "surgeon.capture is missing", "reinstall model-surgeon")
    try:
        error = _difference()
    except SurgeonError as problem:
        return Check(name, "fail", problem.what, problem.hint)
    except Exception as problem:
        return Check(name, "fail", f"{type(problem).__name__}: {problem}".splitlines()[0], "SURGEON_DEBUG=1")
    found = f"two-layer Llama, error {error:.1e}, {time.perf_counter() - start:.1f} s"
    return Check(name, "ok" if error < 1e-4 else "fail", found, "" if error < 1e-4 else "another transformers version")


def _difference() -> float:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(folder)
        tokens = torch.randint(0, config.vocab_size, (2, 7))
        package: Any = importlib.import_module("surgeon")  # its names are found when asked for, unknown to checkers
        logits = package.load(folder)(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return float((logits - model(tokens).logits).abs().max())


def _package(name: str, wanted: str, required: bool) -> Check:
    from importlib import metadata

    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        found = ""
    return _versioned(name, found, wanted, required, install=f'pip install "{name}{wanted}"')


def _versioned(name: str, found: str, wanted: str, required: bool, install: str) -> Check:
    from packaging.specifiers import SpecifierSet

    if found and SpecifierSet(wanted).contains(found, prereleases=True):
        return Check(name, "ok", found)
    shown = f"{found}, supported is {wanted}" if found else "not installed"
    return Check(name, "fail" if required else "note", shown, install)


def _distribution() -> Distribution | None:
    from importlib import metadata

    try:
        return metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
