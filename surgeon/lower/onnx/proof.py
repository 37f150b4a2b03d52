"""What is proven of an export before it is kept: its base, and each of its adapters, in ONNX Runtime against torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

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
    given = as_loaded({}, made.record) if made.record else None
    return replayed(made.reference, files, probes, dtype, made.relative, given)


def of_adapter(
    made: Ready, files: Sequence[Path], probes: Sequence[Probe], dtype: torch.dtype, adapter: Graph, given: Loaded
) -> Replay:
    """The model with an adapter in its slots: what `given` feeds it is to compute what the graph `adapter` does."""
    return replayed(made.reference_of(adapter), files, probes, dtype, made.relative, given)


def replayed(
    graph: Graph,
    files: Sequence[Path],
    probes: Sequence[Probe],
    dtype: torch.dtype,
    relative: float | None,
    given: Loaded | None,
) -> Replay:
    """One model that generates or is run once, or an encoder and a decoder: see `surgeon.lower.onnx.check.replay`."""
    if graph.task in once.TASKS:
        return once.compare(graph, files[0], probes, dtype, relative, given)
    if len(files) == 1:
        return replay(graph, files[0], probes, dtype, given=given, relative=relative)
    (encoder, decoder), pad = files, once.pad_of(graph)
    exact = None if relative is None else Pair(open_unrounded(encoder), open_unrounded(decoder), pad, given)
    pair = replace(Pair.open(encoder, decoder, pad), given=given)
    return seq2seq.replay(graph, pair, probes, dtype, relative, exact)
