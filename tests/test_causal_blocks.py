"""Attention in blocks equals torch's: values, gradients, precision, and where it stands in for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from surgeon import causal_blocks
from surgeon.causal_blocks import can_use, causal_attention
from surgeon.ops import attention


def leaves(heads: int, kv_heads: int, length: int, sizes: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(length)
    shapes = [(2, heads, length, sizes[0]), (2, kv_heads, length, sizes[0]), (2, kv_heads, length, sizes[1])]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def passes(attend: Any, tensors: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """The result and the gradients of q, k, v for one fixed gradient."""
    result = attend(*tensors, scale)
    above = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
    return [result.detach(), *torch.autograd.grad(result, tensors, above.to(result.dtype))]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 200), st.sampled_from([(8, 8), (4, 12)]))
def test_equals_torch(kv_heads: int, repeat: int, length: int, sizes: tuple[int, int]) -> None:
    tensors = leaves(kv_heads * repeat, kv_heads, length, sizes, torch.float32)
    exact = passes(torch_attention, [t.detach().double().requires_grad_() for t in tensors], 0.3)
    for found, expected in zip(passes(causal_attention, tensors, 0.3), exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_is_as_exact_as_torchs_kernel_in_bf16() -> None:
    tensors = leaves(4, 2, 300, (16, 16), torch.bfloat16)
    exact = passes(torch_attention, [t.detach().double().requires_grad_() for t in tensors], 0.25)
    torchs, ours = (passes(attend, tensors, 0.25) for attend in (torch_attention, causal_attention))
    for found, theirs, expected in zip(ours, torchs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() <= 1.2 * (theirs - expected).norm()


def test_takes_the_autocast_dtype() -> None:
    tensors = leaves(2, 2, 70, (8, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = causal_attention(*tensors, 0.3)
        found = passes(causal_attention, tensors, 0.3)
    assert result.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in found[1:])


def test_is_used_where_it_trains_short_texts_on_a_cpu() -> None:
    q, k, v = leaves(2, 2, 512, (4, 4), torch.float32)
    assert can_use(q, k, v, 0.0)
    assert not can_use(q, k, v, 0.1)
    assert not can_use(q.detach(), k.detach(), v.detach(), 0.0)
    assert not can_use(q[:, :, :64], k, v, 0.0)
    assert not can_use(*(x.to("meta") for x in (q, k, v)), 0.0)
    assert not can_use(q.half(), k.half(), v.half(), 0.0)
    with torch.no_grad():
        assert not can_use(q, k, v, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert can_use(q[:, :, :100], k[:, :, :100], v[:, :, :100], 0.0)


def test_the_attention_node_trains_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kept = causal_blocks.causal_attention
    monkeypatch.setattr(causal_blocks, "causal_attention", lambda *args: calls.append(1) or kept(*args))  # type: ignore[func-returns-value]
    tensors = leaves(4, 2, 400, (8, 8), torch.float32)
    found = attention(*tensors, scale=0.3, causal=True)
    torch.testing.assert_close(found, torch_attention(*tensors, 0.3), rtol=1e-4, atol=1e-5)
    assert calls == [1]
    padded = torch.ones(2, 400, dtype=torch.bool)
    padded[0, :3] = False
    attention(*tensors, padded, scale=0.3, causal=True)
    attention(*tensors, scale=0.3)
    assert calls == [1]
