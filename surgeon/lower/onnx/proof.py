"""What is proven of an export before it is kept: its base, and each of its adapters, in ONNX Runtime against torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from surgeon.graph import Graph
from surgeon.lower.onnx import once, seq2seq
from surgeon.lower.onnx.adapter_file import Loaded, as_loaded
from surgeon.lower.onnx.check import Replay, replay
from surgeon.lower.onnx.pair import Pair
from surgeon.lower.onnx.ready import Ready
from surgeon.lower.onnx.unrounded import open_unrounded
from surgeon.verification import Probe


def of_base(made: Ready, files: Sequence[Path], probes: Sequence[Probe], dtype: torch.dtype) -> Replay:
    """The model without any adapter in its slots.

    Args:
        made: what was exported.
        files: its `.onnx` files.
        probes: the prompts.
        dtype: of its weights and arithmetic.
    """
    if made.plain.task == seq2seq.TASK:
        (encoder, decoder), pad = files, once.pad_of(made.plain)
        exact = None if made.relative is None else Pair(open_unrounded(encoder), open_unrounded(decoder), pad)
        return seq2seq.replay(made.reference, Pair.open(encoder, decoder, pad), probes, dtype, made.relative, exact)
    check = once.compare if made.once else replay
    empty: dict[str, Any] = {"given": as_loaded({}, made.record)} if made.record else {}
    return check(made.reference, files[0], probes, dtype, relative=made.relative, **empty)


def of_adapter(
    made: Ready, files: Sequence[Path], probes: Sequence[Probe], dtype: torch.dtype, adapter: Graph, given: Loaded
) -> Replay:
    """The model with an adapter in its slots: what `given` feeds it is to compute what the graph `adapter` does."""
    return replay(made.reference_of(adapter), files[-1], probes, dtype, given=given, relative=made.relative)
