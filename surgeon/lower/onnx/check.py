"""Replaying an exported model in ONNX Runtime against the graph it was made from.

ONNX Runtime decodes greedily through its K/V cache, batch 1 and then all probes in one left-padded batch; the reference
computes the logits of the whole text at once, without a cache, one weight in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgeon import fold, positions
from surgeon.errors import CheckFailed
from surgeon.graph import Graph
from surgeon.lower.onnx.adapter_file import Loaded
from surgeon.lower.onnx.session import Array, decode, left_padded, numbered, open_session
from surgeon.lower.onnx.unrounded import open_unrounded
from surgeon.stream import StreamingExecutor
from surgeon.verification import RELATIVE, Probe

STEPS = 20
Batch = tuple[Array, Array, Array]
"""Ids, mask and logits, see `surgeon.lower.onnx.session.decode`."""


@dataclass(frozen=True)
class Replayed:
    """One batch, decoded.

    Attributes:
        prompts: the token ids of each row, without padding.
        tokens: what was generated, per row.
        max_error: largest |Δlogit| at any unpadded position.
        token_agreement: share of steps at which both predict the same token, or two whose logits differ by no more than
            twice the error.
        exact_agreement: the same without that allowance.
        best_logits: the logit of each generated token, per row.
        unrounded: `max_error` with activations that are not rounded to 8 bits, the same tokens fed at once; None where
            they are not rounded anyway.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    max_error: float
    token_agreement: float
    exact_agreement: float
    best_logits: list[list[float]]
    unrounded: float | None = None


@dataclass(frozen=True)
class Replay:
    """What a replay found; `max_error` is over all batches, `bound` what it may be and `because` why.

    `steps` is 0 for a model that is run once; its batches have no tokens, and the agreement is of what it predicts.
    `unrounded` is the largest of its batches, and may be what the arithmetic of the weights' dtype makes of it.
    """

    max_error: float
    bound: float
    because: str
    token_agreement: float
    largest: float
    steps: int
    batches: list[Replayed]
    unrounded: float | None = None

    def require(self, where: str) -> None:
        """Raise CheckFailed if the error is over the bound (a NaN is) or a token differs."""
        if not self.max_error <= self.bound:
            raise CheckFailed(
                f"ONNX Runtime computes something else: |Δlogit| {self.max_error:.3g} is over the bound "
                f"{self.bound:.3g} ({self.because})",
                where,
                "nothing was written; --precision fp32 is more precise, --no-verify writes it unchecked",
            )
        exact = RELATIVE[torch.float32] * self.largest
        if self.unrounded is not None and not self.unrounded <= exact:
            raise CheckFailed(
                f"ONNX Runtime computes something else: |Δlogit| {self.unrounded:.3g} is over the bound {exact:.3g} "
                "where no activation is rounded",
                where,
                "nothing was written; --precision fp32 has no integers, --no-verify writes it unchecked",
            )
        if self.token_agreement < 1.0:
            raise CheckFailed(
                f"ONNX Runtime {'generates other tokens' if self.steps else 'predicts something else'}: "
                f"{self.token_agreement:.1%} agree",
                where,
                "nothing was written",
            )


def replay(
    graph: Graph,
    file: Path,
    probes: Sequence[Probe],
    dtype: torch.dtype,
    steps: int = STEPS,
    given: Loaded | None = None,
    relative: float | None = None,
) -> Replay:
    """Decode every probe with an exported model and compare all logits.

    Where activations are rounded to 8 bits, the text is run once more without that: a percent of the logits would hide
    what an adapter of small weights does, and whether it is there at all.

    Args:
        graph: the graph without cache: the reference, run in fp32.
        file: the `.onnx` file.
        probes: the prompts; they are shortened to different lengths.
        dtype: of the exported model; the bound depends on it.
        steps: tokens to generate, fewer if the model has no positions for them.
        given: what its slots are fed; None for a model without, or the base's values of optional ones.
        relative: the bound, of the largest logit, where it is not that of the dtype: activations are rounded too.
    """
    prompts = [list(probe.ids[: max(2, len(probe.ids) - 4 * number)]) for number, probe in enumerate(probes)]
    longest = (positions.limit(graph) or 10**9) - virtual_tokens(graph)
    steps = max(1, min(steps, longest - max(len(prompt) for prompt in prompts)))
    rows, reference = ([prompts[0]], prompts), StreamingExecutor(graph)
    made = _decoded(open_session(file), rows, steps, given)
    expected = [_reference(graph, reference, *batch[:2])[:, : batch[2].shape[1]] for batch in made]
    again = [None] * len(made) if relative is None else _again(open_unrounded(file), made, given)
    batches = [_compared(*batch, steps) for batch in zip(rows, made, expected, again, strict=True)]
    return summary(batches, "logit", dtype, relative, steps)


def _decoded(session: Any, rows: Sequence[list[list[int]]], steps: int, given: Loaded | None) -> list[Batch]:
    return [decode(session, *left_padded(prompts), steps, given) for prompts in rows]


def _again(session: Any, made: Sequence[Batch], given: Loaded | None) -> list[Array]:
    """The logits of the same tokens in another session, fed at once."""
    return [decode(session, ids[:, :-1], mask[:, :-1], 1, given)[2] for ids, mask, _ in made]


def _compared(
    prompts: list[list[int]], made: Batch, expected: Array, again: Array | None, steps: int
) -> tuple[Replayed, float]:
    """A batch without its padding."""
    ids, mask, found = made
    seen = mask[:, : found.shape[1], None] > 0
    expected = np.where(seen, expected, 0.0)
    batch, largest = compared(prompts, ids, np.where(seen, found, 0.0), expected, steps)
    error = None if again is None else float(np.abs(np.where(seen, again, 0.0) - expected).max())
    return replace(batch, unrounded=error), largest


def summary(
    batches: Sequence[tuple[Replayed, float]], what: str, dtype: torch.dtype, relative: float | None, steps: int
) -> Replay:
    """One replay of its batches, each with the largest number that torch computed in it."""
    found, largest = [batch for batch, _ in batches], max(size for _, size in batches)
    counts = [len(batch.prompts) for batch in found]
    exact = [batch.unrounded for batch in found if batch.unrounded is not None]
    return Replay(
        max_error=float(np.max([batch.max_error for batch in found])),  # NaN if any is
        **bounded(what, largest, dtype, relative),
        token_agreement=sum(b.token_agreement * n for b, n in zip(found, counts, strict=True)) / sum(counts),
        largest=largest,
        steps=steps,
        batches=found,
        unrounded=float(np.max(exact)) if exact else None,
    )


def bounded(what: str, largest: float, dtype: torch.dtype, relative: float | None) -> dict[str, Any]:
    """The bound of a replay, and why it is that."""
    why = "activations in 8 bits" if relative else str(dtype).removeprefix("torch.")
    share = relative or RELATIVE[dtype]
    return {"bound": share * largest, "because": f"{share:g} of the largest {what}, for {why}"}


def virtual_tokens(graph: Graph, role: str = "") -> int:
    """How many positions columns take before the text, of attentions of one role if it is given."""
    found = [item for item in fold.columns(graph) if role in ("", item.site.role)]
    return sum({item.owner: item.columns().k.shape[1] for item in found}.values())


def compared(prompts: list[list[int]], ids: Array, found: Array, expected: Array, steps: int) -> tuple[Replayed, float]:
    """What a batch's logits say, and the largest of torch's.

    Args:
        prompts: the text of each row.
        ids: the tokens that were fed and, of the last `steps`, generated `[b, t + 1]`.
        found: ONNX Runtime's logits `[b, t, vocab]`.
        expected: torch's; both 0 at padding.
        steps: how many were generated.
    """
    error = float(np.abs(found - expected).max())
    start = found.shape[1] - steps
    chosen = ids[:, start + 1 :]
    theirs = np.take_along_axis(expected[:, start:], chosen[..., None], -1)[..., 0]
    best = expected[:, start:].max(-1)
    return Replayed(
        prompts=prompts,
        tokens=chosen.tolist(),
        max_error=error,
        token_agreement=float((best - theirs <= 2 * error).mean()),
        exact_agreement=float((best == theirs).mean()),
        best_logits=np.take_along_axis(found[:, start:], chosen[..., None], -1)[..., 0].round(6).tolist(),
    ), float(np.abs(expected).max())


def _reference(graph: Graph, run: StreamingExecutor, ids: Array, mask: Array) -> Array:
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": numbered(mask),
        "token_type_ids": np.zeros_like(ids),
    }
    logits = run(*(torch.from_numpy(given[name]) for name in graph.inputs))[graph.outputs.index("logits")]
    result: Array = logits.float().numpy()
    return result
