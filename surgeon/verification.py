"""Do two graphs compute the same function? Measured on probes, against a bound that says where it comes from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surgeon.errors import CheckFailed, UsageError
from surgeon.graph import Graph
from surgeon.resident import peak_bytes
from surgeon.stream import StreamingExecutor

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it",
    "def main(argv):\n    for name in sorted(argv):\n        print(",
    "In 1969 three people flew to the moon. One of them",
)
RELATIVE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Bound of a comparison of two unrelated folders, by the coarser dtype, relative to the largest output."""
FLOOR = 2e-5
"""Rounding of fp32 arithmetic in another order, relative to the largest output."""


@dataclass(frozen=True)
class Probe:
    """One prompt: what it says, and its tokens `[t]`."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ProbeResult:
    """One probe: the largest absolute difference of any output, and the share of positions with the same best token."""

    text: str
    max_error: float
    token_agreement: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        max_error: largest absolute difference of any output, over all probes.
        bound: what it may be.
        because: where the bound comes from.
        token_agreement: share of positions at which both predict the same token (1.0 for tasks without logits).
        largest: largest absolute output of the reference.
        probes: the same per probe.
        seconds: time taken.
        peak_rss_bytes: the process's peak memory so far.
    """

    max_error: float
    bound: float
    because: str
    token_agreement: float
    largest: float
    probes: tuple[ProbeResult, ...] = field(repr=False)
    seconds: float
    peak_rss_bytes: int

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound (a NaN is not)."""
        return self.max_error <= self.bound

    def require(self, where: str) -> None:
        """Raise CheckFailed if the error is over the bound."""
        if not self.ok:
            raise CheckFailed(
                f"not the same function: error {self.max_error:.3g}, bound {self.bound:.3g} ({self.because})",
                where,
                "nothing was written; surgeon verify shows the error of each probe",
            )


def make_probes(graph: Graph, tokenizer: Any = None, length: int = 16) -> list[Probe]:
    """Prompts through the tokenizer if there is one, else seeded random tokens; always three, at most `length` long."""
    vocabulary = int(getattr(graph.config.get_text_config(), "vocab_size", 0)) or 100
    probes = []
    for number, text in enumerate(PROBE_TEXTS):
        if tokenizer is not None:
            ids = [i for i in tokenizer(text)["input_ids"] if i < vocabulary][:length]
        else:
            generator = torch.Generator().manual_seed(number)
            ids = torch.randint(0, vocabulary, (length - number,), generator=generator).tolist()
            text = f"random tokens, seed {number}"
        if ids:
            probes.append(Probe(text, tuple(ids)))
    return probes


def probe_inputs(graph: Graph, probe: Probe) -> list[torch.Tensor]:
    """The graph's inputs for one probe, without padding; a decoder is given the probe's first half reversed.

    Of multiple choice it has two choices, itself and itself reversed.
    """
    ids = torch.tensor([probe.ids])
    if graph.task == "multiple-choice":
        ids = torch.stack([ids, ids.flip(-1)], 1)
    decoder = ids[:, : max(2, ids.shape[1] // 2)].flip(1)
    inputs = []
    for name in graph.inputs:
        own = decoder if name.startswith("decoder_") else ids
        if name.endswith("input_ids"):
            inputs.append(own)
        elif name.endswith("attention_mask"):
            inputs.append(torch.ones_like(own))
        elif name == "position_ids":
            inputs.append(torch.arange(own.shape[-1]).expand(own.shape))
        elif name == "token_type_ids":
            inputs.append(torch.zeros_like(own))
        else:
            raise UsageError(f"no probe for the input {name}", graph.source, "verify the graph before this pass")
    return inputs


def outputs(
    graph: Graph, probes: Sequence[Probe], release: Callable[[], None] = lambda: None
) -> list[list[torch.Tensor]]:
    """Every output of the graph on every probe, in fp32, one weight in memory at a time."""
    run = StreamingExecutor(graph, release=release)
    results = run.batch([probe_inputs(graph, probe) for probe in probes])
    return [[value.float() for value in result] for result in results]


def compare(
    reference: Graph,
    candidate: Graph,
    *,
    probes: Sequence[Probe],
    rounded: Graph | None = None,
    dtype: torch.dtype = torch.float32,
    release: Callable[[], None] = lambda: None,
) -> Comparison:
    """Run both graphs on the probes, in fp32 arithmetic whatever dtype their weights are stored in.

    Args:
        reference: what it should compute.
        candidate: what is checked.
        probes: the inputs.
        rounded: the reference merged in fp32 and rounded once to the stored dtype. With it the bound is twice that
            graph's own error: a correct merge has exactly it. Without, it is a tolerance by dtype.
        dtype: the coarser of the two stored dtypes, for that tolerance.
        release: gives mapped pages back, after every layer.
    """
    began = time.perf_counter()
    if reference.outputs != candidate.outputs:
        raise UsageError(
            f"the models return {reference.outputs} and {candidate.outputs}", candidate.source, "compare the same task"
        )
    expected = outputs(reference, probes, release)
    found = outputs(candidate, probes, release)
    largest = max(float(value.abs().max()) for values in expected for value in values)
    results = [_result(probe, e, f, reference.outputs) for probe, e, f in zip(probes, expected, found, strict=True)]
    if rounded is None:
        bound, because = RELATIVE[dtype] * largest, f"{RELATIVE[dtype]:g} of the largest output, for {dtype}"
    else:
        once = outputs(rounded, probes, release)
        error = max(_error(e, o) for e, o in zip(expected, once, strict=True))
        bound = 2 * error + FLOOR * largest
        because = f"twice the error {error:.3g} of rounding the fp32 merge once, plus fp32 arithmetic"
    agreement = sum(r.token_agreement * len(p.ids) for r, p in zip(results, probes, strict=True))
    return Comparison(
        max_error=max(result.max_error for result in results) if not _any_nan(results) else float("nan"),
        bound=bound,
        because=because,
        token_agreement=agreement / sum(len(probe.ids) for probe in probes),
        largest=largest,
        probes=tuple(results),
        seconds=time.perf_counter() - began,
        peak_rss_bytes=peak_bytes(),
    )


def _result(probe: Probe, expected: list[torch.Tensor], found: list[torch.Tensor], names: Sequence[str]) -> ProbeResult:
    agreement = 1.0
    for name, e, f in zip(names, expected, found, strict=True):
        if name.endswith("logits") and e.shape == f.shape:
            agreement = min(agreement, float((e.argmax(-1) == f.argmax(-1)).float().mean()))
    return ProbeResult(probe.text, _error(expected, found), agreement)


def _error(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    for e, f in zip(expected, found, strict=True):
        if e.shape != f.shape:
            raise UsageError(
                f"the outputs have shapes {tuple(e.shape)} and {tuple(f.shape)}", "", "compare like with like"
            )
    errors = torch.stack([(e - f).abs().max() for e, f in zip(expected, found, strict=True)])
    return float(errors.max()) if not bool(errors.isnan().any()) else float("nan")


def _any_nan(results: Sequence[ProbeResult]) -> bool:
    return any(result.max_error != result.max_error for result in results)
