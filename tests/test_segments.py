"""Shifted sparse attention against its definition: every query, head and segment written out in NumPy-like loops."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon import ops
from surgeon.segments import boundaries

SCALE = 0.3


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **options: object):  # type: ignore[no-untyped-def]
    return torch.ops.surgeon.attention(q, k, v, mask, scale=SCALE, causal=True, **options)


def allowed(length: int, group: int, shift: int, leading: int, window: int) -> torch.Tensor:
    """gid = ⌊(i + shift) / G⌋, counted from the first token."""
    i = torch.arange(length) - leading
    gid = torch.div(i + shift, group, rounding_mode="floor")
    seen = (i[:, None] >= i[None]) & (gid[:, None] == gid[None])
    return seen & (i[None] > i[:, None] - window) if window else seen


def by_definition(q, k, v, mask, group, prefix, window):  # type: ignore[no-untyped-def]
    heads, length = q.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    result = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for row, head in itertools.product(range(q.shape[0]), range(heads)):
        leading = 0 if mask is None else int((mask[row, prefix:].cumsum(0) == 0).sum())
        shift = group // 2 if head >= heads // 2 else 0
        seen = allowed(length, group, shift, leading, window)
        seen = torch.cat([torch.ones(length, prefix, dtype=torch.bool), seen], 1)
        seen = seen if mask is None else seen & mask[row].bool()
        scores = (q[row, head] @ k[row, head].T * SCALE).masked_fill(~seen, -torch.inf)
        result[row, head] = torch.softmax(scores, -1).nan_to_num() @ v[row, head]
    return result


@settings(max_examples=120, deadline=None)
@given(
    length=st.integers(1, 19), group=st.integers(2, 9), kv=st.sampled_from([(6, 1), (6, 2), (6, 6), (8, 4), (2, 1)]),
    prefix=st.sampled_from([0, 2]), window=st.sampled_from([0, 3]), padding=st.integers(-4, 4), seed=st.integers(0, 9),
)  # fmt: skip
def test_definition(
    length: int, group: int, kv: tuple[int, int], prefix: int, window: int, padding: int, seed: int
) -> None:
    """Any length, odd groups, grouped K/V heads, prefix columns, windows, and padding on either side."""
    torch.manual_seed(seed)
    heads, kv_heads = kv
    q = torch.randn(2, heads, length, 4, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, length + prefix, size, dtype=torch.float64) for size in (4, 3))
    mask = None
    if 0 < abs(padding) < length:
        mask = torch.ones(2, length + prefix, dtype=torch.int64)
        mask[1, slice(prefix, prefix + padding) if padding > 0 else slice(padding, None)] = 0
    real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask[:, prefix:].bool()
    found = attend(q, k, v, mask, group=group, prefix=prefix, window=window)
    expected = by_definition(q, k, v, mask, group, prefix, window)
    torch.testing.assert_close(found.transpose(1, 2)[real], expected.transpose(1, 2)[real])


@pytest.mark.parametrize("group", [4, 5, 8])
def test_roll_is_the_same_but_for_the_first_tokens_of_the_shifted_heads(group: int) -> None:
    """The paper's roll differs for tokens 0…⌈G/2⌉−1 of half of the heads, and for nothing else."""
    first = group - group // 2
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 4 * group, 6, dtype=torch.float64) for _ in range(3))
    cut, rolled = attend(q, k, v, group=group), attend(q, k, v, group=group, wrap=True)
    torch.testing.assert_close(cut[:, :2], rolled[:, :2])
    torch.testing.assert_close(cut[:, 2:, first:], rolled[:, 2:, first:])
    assert not torch.allclose(cut[:, 2:, :first], rolled[:, 2:, :first])


@pytest.mark.parametrize(("wrap", "leaks"), [(False, False), (True, True)])
def test_no_gradient_from_the_last_token_to_the_first(wrap: bool, leaks: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 16, 6, dtype=torch.float64) for _ in range(3))
    k.requires_grad_(True)
    attend(q, k, v, group=4, wrap=wrap)[:, :, :2].sum().backward()
    assert k.grad is not None
    assert bool(k.grad[:, :, 15].any()) is leaks


def test_bias_and_soft_caps_go_with_their_segment() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 12, 6, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    hidden = [~allowed(12, 4, shift, 0, 0) for shift in (0, 2)]
    mask = torch.stack([hidden[0], hidden[0], hidden[1], hidden[1]])[None]
    found = attend(q, k, v, bias=bias, group=4)
    torch.testing.assert_close(found, attend(q, k, v, bias=bias[0], group=4))
    expected = attend(q, k, v, bias=bias.masked_fill(mask, -torch.inf))
    torch.testing.assert_close(found, expected)
    capped = attend(q, k, v, group=4, softcap=2.0)
    assert not torch.allclose(capped, attend(q, k, v, group=4))


def test_left_padding_moves_no_boundary() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    padded = [torch.cat([torch.zeros(1, 2, 3, 4, dtype=torch.float64), x], 2) for x in (q, k, v)]
    mask = torch.tensor([[0] * 3 + [1] * 9])
    torch.testing.assert_close(attend(*padded, mask, group=4)[:, :, 3:], attend(q, k, v, group=4))


def test_memory_grows_with_the_length_and_not_its_square() -> None:
    """No intermediate of a text of 4,096 tokens is as large as its square."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    q, k, v = (torch.randn(1, 2, 4096, 4) for _ in range(3))
    with Sizes():
        attend(q, k, v, torch.tensor([[1] * 4095 + [0]]), group=64)
    assert largest < 4096 * 64 * 4


def test_boundaries() -> None:
    assert boundaries(16, 4, 2) == [0, 2, 6, 10, 14, 16]
    assert boundaries(16, 4, 0) == [0, 4, 8, 12, 16]
    assert boundaries(3, 8, 4) == [0, 3]
    assert ops.key_offset(3, 5) == 2
