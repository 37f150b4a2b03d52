"""Encoder-decoders: an encoder and one decoder graph for the first call and all others, replayed against torch.

    encoder_model          input_ids, attention_mask → last_hidden_state
    decoder_model_merged   input_ids, encoder_hidden_states, encoder_attention_mask,
                           past_key_values.{i}.{decoder,encoder}.{key,value} → logits, present.{i}….{key,value}

The names are optimum's, which transformers.js looks for. Where optimum's decoder has two branches and a switch
(`use_cache_branch`), this one has a cache: keys and values of the encoder's states are computed for those states that
have none there, so in the first call for all of them and then for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from surgeon import halves, positions, run, virtual
from surgeon.errors import UnsupportedError, UsageError
from surgeon.generate import generation_config
from surgeon.graph import Graph
from surgeon.lower.onnx.check import STEPS, Replay, Replayed, compared, summary, virtual_tokens
from surgeon.lower.onnx.pair import DECODER, ENCODER, Pair
from surgeon.lower.onnx.session import Array, padded
from surgeon.passes import make
from surgeon.sites import ATTENTION, sites
from surgeon.stream import StreamingExecutor
from surgeon.verification import Probe

TASK = "seq2seq-lm"
NAMES = {halves.IDS: "input_ids", "attention_mask": "encoder_attention_mask"}
WHY = "encoder-decoders are lowered to standard operators"


def parts(plain: Graph) -> dict[str, Graph]:
    """Encoder and decoder as they are lowered, by their files' names.

    Raises:
        UnsupportedError: virtual tokens stand before the decoder's, whose keys and values depend on the encoder's text;
            or the decoder is none that can be cut off or have a cache.
    """
    if virtual.count(plain, halves.IDS):
        what = (
            f"virtual tokens before the decoder's tokens have no constant keys and values in {plain.config.model_type}"
        )
        raise UnsupportedError(what, plain.source, "train the encoder's (side=encoder), or a prefix")
    decoder = run.apply(halves.decoder_of(plain), make("kv_cache"))
    return {ENCODER: halves.encoder_of(plain), DECODER: halves.renamed(decoder, NAMES)}


def fallbacks(plain: Graph) -> dict[str, list[str]]:
    """Why there is no fused attention, and where."""
    return {WHY: [site.path for site in sites(plain, ATTENTION)]}


def first_tokens(graph: Graph) -> list[int]:
    """What every row of the decoder begins with: the token that starts it, and the one that is forced after it."""
    config = generation_config(graph)
    known = (config.decoder_start_token_id, config.bos_token_id, config.pad_token_id, 0)
    start = next(token for token in known if token is not None)
    forced = config.forced_bos_token_id
    return [int(start)] if forced is None else [int(start), int(forced)]


def replay(
    graph: Graph,
    pair: Pair,
    probes: Sequence[Probe],
    dtype: torch.dtype,
    relative: float | None = None,
    exact: Pair | None = None,
) -> Replay:
    """Encode every probe once, decode greedily, alone and all in one padded batch, and compare all logits.

    Args:
        graph: the whole model: the reference, run in fp32.
        pair: the exported models, and what their slots are fed.
        probes: the encoder's texts; they are shortened to different lengths.
        dtype: of the exported models; the bound depends on it.
        relative: see `surgeon.lower.onnx.check.replay`.
        exact: where activations are rounded, the same models without that.
    """
    rows = [list(probe.ids[: max(2, len(probe.ids) - 4 * number)]) for number, probe in enumerate(probes)]
    room = _room(graph, max(len(row) for row in rows))
    rows, first = [row[:room] for row in rows], first_tokens(graph)
    longest = (positions.limit(graph) or 10**9) - virtual_tokens(graph, "decoder")
    steps = max(1, min(STEPS, longest - len(first)))
    reference = StreamingExecutor(graph)
    batches = [_one(graph, reference, (pair, exact), batch, first, steps) for batch in ([rows[0]], rows)]
    return summary(batches, "logit", dtype, relative, steps)


def _room(graph: Graph, length: int) -> int:
    """How many tokens of a text the encoder has positions for, at most `length`."""
    for room in range(length, 1, -1):
        try:
            positions.check_source(graph, room)
        except UsageError:
            continue
        return room
    return 1


def _one(
    graph: Graph,
    reference: StreamingExecutor,
    pairs: tuple[Pair, Pair | None],
    rows: list[list[int]],
    first: list[int],
    steps: int,
) -> tuple[Replayed, float]:
    pair, exact = pairs
    ids, found = pair.decode(rows, first, steps)
    target = torch.from_numpy(ids[:, :-1])
    source = padded(rows, pair.pad)
    given: dict[str, Any] = {name: torch.from_numpy(source[name]) for name in ("input_ids", "attention_mask")}
    given |= {halves.IDS: target, halves.MASK: torch.ones_like(target)}
    results = reference(*(given[name] for name in graph.inputs))
    expected: Array = results[graph.outputs.index("logits")].float().numpy()
    batch, largest = compared(rows, ids, found, expected, steps)
    if exact is None:
        return batch, largest
    again = exact.step(ids[:, :-1], exact.encode(rows))[0]
    return replace(batch, unrounded=float(np.abs(again - expected).max())), largest
