"""Models that are run once, classifiers and encoders: positions made inside, and one pass compared with torch.

Inputs `input_ids`, `attention_mask`, and `token_type_ids` where the model has them; outputs by the model's own names.
Virtual tokens are constants at their places in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from surgeon import numbering, positions, virtual
from surgeon.graph import Graph, copied, sweep, val
from surgeon.lower.onnx.adapter_file import Loaded
from surgeon.lower.onnx.check import Replay, Replayed, summary, virtual_tokens
from surgeon.lower.onnx.session import Array, open_session, padded
from surgeon.lower.onnx.unrounded import open_unrounded
from surgeon.lower.onnx.verify import fed_once, told
from surgeon.stream import StreamingExecutor
from surgeon.verification import Probe

aten = torch.ops.aten
TASKS = ("sequence-classification", "token-classification", "question-answering", "multiple-choice", "features")


def numbered(graph: Graph) -> Graph:
    """The graph without an input for positions: those of `surgeon.numbering.default`, made of the other inputs."""
    if numbering.INPUT not in graph.inputs:
        return graph
    trunk, _ = copied(graph.trunk)
    inputs = {str(node.target): node for node in trunk.nodes if node.op == "placeholder"}
    given = inputs[numbering.INPUT]
    with trunk.inserting_before(list(inputs.values())[-1].next):
        given.replace_all_uses_with(_positions(trunk, graph, inputs["input_ids"], inputs.get("attention_mask")))
    trunk.erase_node(given)
    sweep(trunk)
    result = graph.copy()
    result.trunk = trunk
    return result


def _positions(trunk: fx.Graph, graph: Graph, ids: fx.Node, mask: fx.Node | None) -> fx.Node:
    """What `numbering.default` computes, as nodes: `[b, t]`."""
    call, axis = trunk.call_function, val(ids).dim() - 1
    ones = call(aten.ones_like.default, (ids,))
    start = numbering.first(graph)
    if start and not virtual.count(graph):
        real = call(aten.to.dtype, (call(aten.ne.Scalar, (ids, start - 1)), torch.int64))
        return call(aten.add.Tensor, (_counted(trunk, real, axis), start - 1))
    if mask is not None and graph.config.model_type in numbering.BY_MASK:
        return call(aten.sub.Tensor, (_counted(trunk, mask, axis), 1))
    return call(aten.add.Tensor, (call(aten.cumsum.default, (ones, axis)), start - 1))


def _counted(trunk: fx.Graph, real: fx.Node, axis: int) -> fx.Node:
    """1, 2, … at what is real, 0 elsewhere."""
    count = trunk.call_function(aten.cumsum.default, (real, axis))
    return trunk.call_function(aten.mul.Tensor, (count, real))


def compare(
    graph: Graph,
    file: Path,
    probes: Sequence[Probe],
    dtype: torch.dtype,
    relative: float | None = None,
    given: Loaded | None = None,
) -> Replay:
    """Run an exported model on the first probe alone and on all in one batch padded on the right.

    Args:
        graph: what was exported: the reference, run in fp32.
        file: the `.onnx` file.
        probes: the texts; they are shortened to different lengths.
        dtype: of the exported model; the bound depends on it.
        relative: see `surgeon.lower.onnx.check.replay`.
        given: what its slots are fed; None for a model without, or the base's values of optional ones.
    """
    sessions = [open_session(file), *([] if relative is None else [open_unrounded(file)])]
    slots = given.feed() if given else {}
    reference = StreamingExecutor(graph)
    room = (positions.limit(graph) or 10**9) - virtual_tokens(graph)
    rows = [list(probe.ids[: max(2, len(probe.ids) - 4 * number)][:room]) for number, probe in enumerate(probes)]
    batches = [_one(graph, reference, sessions, batch, slots) for batch in ([rows[0]], rows)]
    return summary(batches, "output", dtype, relative, 0)


def _one(
    graph: Graph, run: StreamingExecutor, sessions: Sequence[Any], rows: list[list[int]], slots: Mapping[str, Array]
) -> tuple[Replayed, float]:
    """One batch through torch, a session and maybe one that rounds no activations, and the largest output of torch."""
    given = _inputs(graph, rows)
    expected = [value.float().numpy() for value in run(*(torch.from_numpy(given[name]) for name in graph.inputs))]
    fed = fed_once(sessions[0], given, slots)
    made = [[value.astype(np.float32) for value in one.run(list(graph.outputs), fed)] for one in sessions]
    error, *exact_error = (
        float(np.max([np.abs(e - f).max() for e, f in zip(expected, found, strict=True)])) for found in made
    )
    pairs = list(zip(expected, made[0], strict=True))
    scores = [pair for name, pair in zip(graph.outputs, pairs, strict=True) if name.endswith("logits")]
    exact, near = _agreement(scores, error)
    return Replayed(
        prompts=rows,
        tokens=[],
        max_error=error,
        token_agreement=near,
        exact_agreement=exact,
        best_logits=[f.max(-1).ravel().round(6).tolist() for f in told(list(graph.outputs), made[0])],
        unrounded=next(iter(exact_error), None),
    ), max(float(np.abs(e).max()) for e, _ in pairs)


def pad_of(graph: Graph) -> int:
    """The id that pads a text, 0 if the model has none."""
    return int(getattr(graph.config.get_text_config(), "pad_token_id", None) or 0)


def _inputs(graph: Graph, rows: list[list[int]]) -> dict[str, Array]:
    """Ids and mask `[b, t]` padded on the right, and positions."""
    given = padded(rows, pad_of(graph), choices=graph.task == "multiple-choice")
    tensors = (torch.from_numpy(given[name]) for name in ("attention_mask", "input_ids"))
    given[numbering.INPUT] = numbering.default(graph, *tensors, virtual=virtual.count(graph)).numpy()
    return given


def _agreement(scores: list[tuple[Array, Array]], error: float) -> tuple[float, float]:
    """Share of predictions that are equal, and that of those that are or differ by no more than twice the error."""
    exact, near = [1.0], [1.0]
    for expected, found in scores:
        theirs = np.take_along_axis(expected, found.argmax(-1)[..., None], -1)[..., 0]
        best = expected.max(-1)
        exact.append(float((best == theirs).mean()))
        near.append(float((best - theirs <= 2 * error).mean()))
    return min(exact), min(near)
