"""The standard forms of surgeon's operators compute what the operators compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgeon import ops
from surgeon.lower.onnx import standard

CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 3},
    "symmetric window": {"window": 2},
    "chunk": {"causal": True, "chunk": 4},
    "softcap": {"causal": True, "softcap": 5.0},
    "everything": {},
}


def tensors(queries: int, keys: int, heads: int = 4, shared: int = 2) -> list[torch.Tensor]:
    sizes = ((heads, queries, 8), (shared, keys, 8), (shared, keys, 6))
    return [torch.randn(3, *size) for size in sizes]


def padded(keys: int) -> torch.Tensor:
    mask = torch.ones(3, keys, dtype=torch.bool)
    mask[1, :3] = False
    mask[2, :5] = False
    return mask


@pytest.mark.parametrize("queries", [7, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_attention(case: str, queries: int) -> None:
    given = [*tensors(queries, 7), padded(7)]
    expected = ops.attention(*given, scale=0.3, **CASES[case])
    torch.testing.assert_close(standard.attention(*given, scale=0.3, **CASES[case]), expected)


def test_attention_without_shared_heads_and_without_a_mask() -> None:
    q, k, v = tensors(5, 5, heads=2)
    expected = ops.attention(q, k, v, scale=0.3, causal=True)
    torch.testing.assert_close(standard.attention(q, k, v, scale=0.3, causal=True), expected)


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_attention_with_a_bias(kind: str) -> None:
    bias = torch.randn(1, 4, 7, 7) if kind == "float" else torch.rand(3, 1, 7, 7) > 0.5
    given = [*tensors(7, 7), padded(7), bias]
    expected = ops.attention(*given, scale=0.3)
    torch.testing.assert_close(standard.attention(*given, scale=0.3), expected)


def test_attention_with_sinks() -> None:
    given = [*tensors(4, 7), padded(7), None, torch.randn(4)]
    expected = ops.attention(*given, scale=0.3, causal=True, window=3)
    torch.testing.assert_close(standard.attention(*given, scale=0.3, causal=True, window=3), expected)


def test_a_query_that_sees_nothing_gives_zero() -> None:
    found = standard.attention(*tensors(7, 7), padded(7), scale=0.3, causal=True)
    assert not found[2, :, :5].any()
    assert found[2, :, 5:].all()
    assert found.isfinite().all()


def test_sorting_keeps_the_order_of_equals() -> None:
    x = torch.tensor([3, 1, 3, 1, 2])
    assert standard.argsort(x).sort()[0].tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(standard.sort(x)[0], torch.sort(x)[0])
    torch.testing.assert_close(standard.sort(x, descending=True)[0], torch.sort(x, descending=True)[0])
