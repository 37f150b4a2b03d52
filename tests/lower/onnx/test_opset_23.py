"""Operators of opset 23 as surgeon writes them, each lowered by itself, against what they stand for."""

from __future__ import annotations

import operator
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import fx

from surgeon import ops
from surgeon.lower.onnx import norms, opset_23, rotary
from surgeon.lower.onnx.parts import lower_part
from tests.lower.onnx.test_norms import written

HEADS, SHARED, SIZE = 4, 2, 8
CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "symmetric": {"window": 2},
    "chunk": {"causal": True, "chunk": 4},
    "prefix": {"causal": True, "window": 3, "prefix": 2},
    "everything": {},
}


def session_of(part: fx.Graph, *samples: tuple[torch.Tensor, ...]) -> onnxruntime.InferenceSession:
    """A part lowered by itself; its inputs are in order."""
    file = ir.to_proto(lower_part(part, *samples, 23)).SerializeToString()
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, *given: torch.Tensor) -> list[torch.Tensor]:
    names = [node.name for node in session.get_inputs()]
    return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, (g.numpy() for g in given), strict=True)))]


def tensors(batch: int, queries: int, keys: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    sizes = ((batch, HEADS, queries, SIZE), (batch, SHARED, keys, SIZE), (batch, SHARED, keys, 6))
    found = [torch.randn(size, generator=generator) for size in sizes]
    mask = torch.ones(batch, keys, dtype=torch.bool)
    for row in range(batch):
        mask[row, : 2 * row] = False
    return [*found, mask, torch.randn(1, HEADS, 1, keys, generator=generator)]


def test_the_operator_computes_what_the_attention_node_does() -> None:
    """Grouped heads, values of another size, rows padded on the left, with and without a bias: no row is NaN."""
    part = fx.Graph()
    q, k, v, mask, bias = (part.placeholder(name) for name in ("q", "k", "v", "mask", "bias"))
    calls: list[tuple[tuple[fx.Node | None, ...], dict[str, Any]]]
    calls = [((q, k, v, mask, bias if "window" in options else None), options) for options in CASES.values()]
    calls += [((q, k, v), {}), ((q, k, v, None, bias), {})]
    part.output(tuple(part.call_function(opset_23.attention, a, {"scale": 0.3, **o}) for a, o in calls))
    session = session_of(part, tuple(tensors(2, 3, 9)), tuple(tensors(3, 5, 11)))
    for batch, queries, keys in ((3, 7, 7), (3, 1, 8), (1, 4, 9)):
        given = tensors(batch, queries, keys)
        real = given[3][:, -queries:]
        found = run_session(session, *given)
        known: dict[fx.Node | None, Any] = dict(zip((q, k, v, mask, bias), given, strict=True)) | {None: None}
        for (args, options), result in zip(calls, found, strict=True):
            expected = ops.attention(*(known[one] for one in args), scale=0.3, **options)
            assert not result.isnan().any(), options
            assert (result - expected).transpose(1, 2)[real].abs().max() < 2e-6, options


def test_it_keeps_the_cache() -> None:
    """A prefill of rows padded on the left, then steps, one of several tokens."""
    part = fx.Graph()
    names = ("q", "k", "v", "past_k", "past_v", "mask", "ids")
    q, k, v, past_k, past_v, mask, ids = (part.placeholder(name) for name in names)
    added = part.call_function(opset_23.added, (mask, ids, torch.float32, True, 4, 0, 0))
    options = {"heads": HEADS, "scale": 0.3}
    made = part.call_function(opset_23.cached, (q, k, v, past_k, past_v, added), options)
    part.output(tuple(part.call_function(operator.getitem, (made, position)) for position in range(3)))

    def feed(batch: int, start: int, end: int) -> tuple[torch.Tensor, ...]:
        q, k, v, mask, _ = tensors(batch, 12, 12)
        rows = [x[:, :, start:end].transpose(1, 2).flatten(2) for x in (q, k, v)]
        return (*rows, k[:, :, :start], v[:, :, :start], mask[:, :end], torch.zeros(batch, end - start).long())

    session = session_of(part, feed(2, 4, 7), feed(3, 5, 10))
    for batch in (1, 3):
        q, k, v, mask, _ = tensors(batch, 12, 12)
        expected = ops.attention(q, k, v, mask, scale=0.3, causal=True, window=4).transpose(1, 2).flatten(2)
        for start, end in ((0, 6), (6, 7), (7, 10), (10, 12)):
            result, keys, values = run_session(session, *feed(batch, start, end))
            assert torch.equal(keys, k[:, :, :end])
            assert torch.equal(values, v[:, :, :end])
            assert not result.isnan().any()
            assert (result - expected[:, start:end])[mask[:, start:end]].abs().max() < 2e-6


def test_rotations_and_norms() -> None:
    """All channels or the first, halves or pairs; a norm as transformers writes it."""
    part = fx.Graph()
    x, cos, sin = (part.placeholder(name) for name in ("x", "cos", "sin"))
    given = [part.call_function(opset_23.rotated, (x, cos, sin), {"heads": 2, "pairs": p}) for p in (False, True)]
    part.output(tuple(given))
    for width in (4, 8):
        made = [(torch.randn(b, t, 16), *torch.randn(2, b, t, width // 2)) for b, t in ((2, 3), (3, 5))]
        found = run_session(session_of(part, *made), *made[0])
        heads = made[0][0].unflatten(2, (2, 8)).transpose(1, 2)
        for pairs, result in zip((False, True), found, strict=True):
            expected = rotary.turned(heads, *made[0][1:], pairs=pairs).transpose(1, 2).flatten(2)
            torch.testing.assert_close(result, expected)
    part, _ = written(1e-3)
    rows, weight = torch.randn(2, 3, 16), torch.randn(16)
    (expected,) = fx.Interpreter(torch.nn.Module(), graph=part).run(rows, weight)
    assert norms.fuse(part, opset_23.norm) == 1
    part.eliminate_dead_code()
    torch.testing.assert_close(run_session(session_of(part, (rows, weight), (rows, weight)), rows, weight)[0], expected)
