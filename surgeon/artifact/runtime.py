"""Running an artifact: on a GPU by its binaries, without Triton, elsewhere by the reference of every operator.

Nothing here imports transformers or Triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from surgeon import module
from surgeon.artifact.binaries import Binaries, choose
from surgeon.artifact.cache import Cache, weight_bytes
from surgeon.artifact.driver import Driver
from surgeon.artifact.manifest import (
    PROGRAM,
    TOKENIZER,
    WEIGHTS,
    Manifest,
    Probe,
    agreement,
    check_weights,
    read_manifest,
    read_program,
    require_memory,
)
from surgeon.artifact.operators import longest, on_gpu
from surgeon.artifact.program import Program, from_json
from surgeon.artifact.steps import Steps
from surgeon.errors import UnsupportedError, UsageError
from surgeon.kernels.jit import launcher
from surgeon.kernels.pages import plan

Choose = Callable[[torch.Tensor], torch.Tensor]
"""Logits `[b, vocab]` → tokens `[b]`."""


@dataclass(frozen=True)
class Replay:
    """What replaying an artifact's probes found.

    Attributes:
        probes: how many.
        tokens: of all of them.
        agreement: share of the tokens that came out again; after a tie all count.
        exact: share of the probes whose tokens are equal.
    """

    probes: int
    tokens: int
    agreement: float
    exact: float

    @property
    def ok(self) -> bool:
        """Whether the artifact still says what it said."""
        return self.agreement == 1.0


class Artifact:
    """A model that runs.

    Attributes:
        folder: where it was read from.
        manifest: what it is.
        program: its graph.
        module: the graph on its tensors.
        arch: the architecture whose binaries run, "" for the reference.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, program: Program, device: torch.device, binaries: Binaries | None
    ) -> None:
        self.folder, self.manifest, self.program, self._binaries = folder, manifest, program, binaries
        self.arch = "" if binaries is None else binaries.arch
        graph = program.graph if binaries is None else on_gpu(program.graph)
        self.module = module.load(graph, device=device)
        self.device = device

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, *, stop: Sequence[int] = (), choose: Choose | None = None
    ) -> list[list[int]]:
        """Continuations of prompts, up to and with the first token of `stop`.

        Args:
            prompts: ids of each.
            tokens: at most this many new ones.
            stop: ids that end a continuation.
            choose: the next tokens; the likeliest if not given.

        Raises:
            UsageError: a prompt is empty, or longer with its continuation than the model has positions.
        """
        self._check(prompts, tokens)
        pick = choose or greedy
        longest_text = max(len(prompt) for prompt in prompts) + tokens
        with self._launching():
            cache = Cache(self.module, self.program, len(prompts), longest_text)
            first = torch.cat([pick(self._prefill(cache, i, prompt)) for i, prompt in enumerate(prompts)])
            steps = Steps(self._run, cache, first, [len(prompt) for prompt in prompts], self.program.first, pick)
            found = [[int(token)] for token in first]
            while len(found[0]) < tokens and not all(_ended(row, stop) for row in found):
                for row, token in zip(found, steps.advance().tolist(), strict=True):
                    row.append(token)
        return [_cut(row, stop) for row in found]

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int]) -> torch.Tensor:
        """Logits `[vocab]` after a prompt."""
        with self._launching():
            return self._prefill(Cache(self.module, self.program, 1, len(prompt)), 0, prompt)[0]

    def replay(self) -> Replay:
        """Generate the probes again, one after another."""
        found = [self.generate([probe.prompt], len(probe.tokens))[0] for probe in self.manifest.probes]
        return judged(self.manifest.probes, found, self.manifest.tolerance)

    def tokenizer(self) -> Any:
        """The tokenizer of the `tokenizers` package.

        Raises:
            UsageError: the artifact has none.
        """
        path = self.folder / TOKENIZER
        if not path.is_file():
            raise UsageError("the artifact has no tokenizer", str(self.folder), "give token ids with --ids")
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))

    def _check(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        room = self.manifest.room
        for prompt in prompts:
            if not prompt:
                raise UsageError("a prompt is empty", str(self.folder), "at least one token")
            if room and len(prompt) + tokens > room:
                what = f"{len(prompt)} tokens and {tokens} new ones are more than the model's {room} positions"
                raise UsageError(what, str(self.folder), "a shorter prompt, or fewer --tokens")

    def _prefill(self, cache: Cache, request: int, prompt: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([list(prompt)], device=self.device)
        count = len(prompt)
        tile = min((longest(count, one.heads, one.kv, cache.dtype) for one in self.program.attentions), default=1)
        segments = plan([(count, 0)], tile=tile)
        segments[:, 2] = request
        positions = torch.arange(count, device=self.device)[None] + self.program.first
        return self._run(ids, positions, segments.to(self.device), cache.slots[request, :count])

    def _run(
        self, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[b, vocab]` of the last tokens."""
        given = {"input_ids": ids, "position_ids": positions, "segments": segments, "slots": slots}
        logits: torch.Tensor = self.module(*(given[name] for name in self.program.graph.inputs))[0]
        return logits[:, -1]

    @contextlib.contextmanager
    def _launching(self) -> Iterator[None]:
        if self._binaries is None:
            yield
            return
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with current, launcher(self._binaries):  # the driver launches in the context that is current
            yield


def open_artifact(folder: str | Path, device: str = "auto") -> Artifact:
    """Load an artifact.

    Args:
        folder: the artifact.
        device: "cpu", "cuda", "cuda:1", or "auto" for a GPU if there is one.

    Raises:
        UsageError: a file is missing, damaged or changed.
        UnsupportedError: the artifact is newer than this surgeon, or has no binaries for the GPU.
        SurgeonError: the GPU has too little memory.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    check_weights(path, manifest)
    where = _device(device)
    binaries = _binaries(path, manifest, where) if where.type == "cuda" else None
    values = load_file(path / WEIGHTS, device="cpu")
    program = from_json(read_program(path, manifest), values, str(path / PROGRAM))
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        require_memory(weight_bytes(program), free, "the model", str(path))
    return Artifact(path, manifest, program, where, binaries)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest tokens."""
    return logits.argmax(-1)


def judged(probes: Sequence[Probe], found: Sequence[list[int]], tolerance: float) -> Replay:
    """How far continuations are those of the probes."""
    shares = [agreement(probe, row, tolerance) for probe, row in zip(probes, found, strict=True)]
    same = [probe.tokens == row for probe, row in zip(probes, found, strict=True)]
    count = max(1, len(shares))
    return Replay(len(shares), sum(len(p.tokens) for p in probes), sum(shares) / count, sum(same) / count)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedError("there is no GPU here", "--device", "--device cpu runs the artifact's reference")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device '{name}'", "--device", "cpu or cuda") from error


def _binaries(folder: Path, manifest: Manifest, device: torch.device) -> Binaries:
    arch, text = choose(manifest.archs, torch.cuda.get_device_capability(device), str(folder))
    torch.zeros(1, device=device)  # makes the context
    return Binaries(
        folder, manifest.kernels, arch, text, Driver(), lambda: torch.cuda.current_stream(device).cuda_stream
    )


def _ended(row: list[int], stop: Sequence[int]) -> bool:
    return any(token in stop for token in row)


def _cut(row: list[int], stop: Sequence[int]) -> list[int]:
    end = next((position for position, token in enumerate(row) if token in stop), len(row) - 1)
    return row[: end + 1]
