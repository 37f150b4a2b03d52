"""Shifted sparse attention in the interpreter: output and gradients against SDPA in segments, in float64."""

from __future__ import annotations

import pytest
import torch

from surgeon.kernels import shifted_attention as forward
from surgeon.kernels import shifted_attention_backward as backward
from surgeon.kernels.shifted_attention import Pattern

TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def inputs(heads: int, kv_heads: int, length: int, size: int, batch: int = 2) -> list[torch.Tensor]:
    """q, k, v and a gradient; k and v are laid out `[b, t, h, d]` as a model's linears give them."""
    made = [torch.randn(batch, length, h, size).transpose(1, 2) for h in (kv_heads, kv_heads)]
    return [torch.randn(batch, heads, length, size), *made, torch.randn(batch, heads, length, size)]


def padded(length: int, left: int, right: int, hole: int = 0) -> torch.Tensor:
    """A mask of two texts: one with padding before it and in it, one with padding after it."""
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :left] = False
    mask[0, left + 4 : left + 4 + hole] = False
    mask[1, length - right :] = False
    return mask


def both_passes(q, k, v, grad, mask, pattern):  # type: ignore[no-untyped-def]
    """Output and gradients of the kernels, then the exact ones; places that are padding are left out."""
    out, lse = forward.launch(q, k, v, mask, pattern)
    got = out, *backward.launch(grad, q, k, v, mask, out, lse, pattern)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = forward.reference(*leaves, mask, pattern)
    wanted = exact.detach(), *torch.autograd.grad(exact, leaves, grad.double())
    return got, wanted


def check(q, k, v, grad, mask, pattern):  # type: ignore[no-untyped-def]
    kept = torch.ones_like(grad) if mask is None else mask[:, None, :, None].to(grad.dtype)
    got, wanted = both_passes(q, k, v, grad * kept, mask, pattern)
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        ours = ours * kept if name == "out" else ours
        exact = exact * kept if name == "out" else exact
        assert ours.dtype == q.dtype
        error = float((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=0.1))
        assert error < TOLERANCE[q.dtype], f"{name}: {error}"


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
def test_segments(heads: int, kv_heads: int, wrap: bool) -> None:
    """Both forms, K/V heads that serve one half of the heads or both, an odd group, an odd length, 24 of 32 columns."""
    check(*inputs(heads, kv_heads, 43, 24, batch=1), None, Pattern(0.3, 17, wrap=wrap))


@pytest.mark.parametrize("wrap", [False, True])
def test_padding_before_in_and_after(wrap: bool) -> None:
    check(*inputs(2, 1, 37, 16), padded(37, 6, 9, hole=2), Pattern(0.3, 14, wrap=wrap))


@pytest.mark.parametrize(
    ("length", "pattern"),
    [
        (50, Pattern(0.2, 20, window=6)),
        (20, Pattern(0.2, 20, causal=False)),
        (9, Pattern(0.2, 64)),
        (70, Pattern(0.2, 70)),
        (1, Pattern(0.2, 4)),
    ],
    ids=["window", "both ways", "shorter than a segment", "one segment of two tiles", "one token"],
)
def test_patterns(length: int, pattern: Pattern) -> None:
    check(*inputs(2, 2, length, 16, batch=1), None, pattern)


def test_one_head_is_not_shifted() -> None:
    check(*inputs(1, 1, 33, 16, batch=1), None, Pattern(0.3, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(*(x.to(dtype) for x in inputs(2, 1, 40, 32, batch=1)), None, Pattern(0.2, 32))


def test_more_than_one_tile_of_a_segment() -> None:
    """Keys before the diagonal, and tiles that the second half of the heads shares with no segment of the first."""
    check(*inputs(2, 1, 300, 16, batch=1), None, Pattern(0.25, 200))


def test_text_of_padding_alone_is_zero() -> None:
    q, k, v, grad = inputs(2, 2, 20, 16)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0] = False
    got, _ = both_passes(q, k, v, grad, mask, Pattern(0.3, 8))
    for tensor in got:
        assert torch.isfinite(tensor).all()
        assert not tensor[0].any()


def test_operator_trains_and_is_one_node() -> None:
    q, k, v, grad = inputs(4, 2, 16, 8)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    arguments = (padded(16, 3, 5), 0.3, 6, True, False, 0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = torch.ops.surgeon.shifted_attention(*leaves, *arguments)
    exact = forward.reference(*leaves, arguments[0], Pattern(*arguments[1:]))
    torch.testing.assert_close(out, exact)
    got, wanted = (torch.autograd.grad(x, leaves, grad, retain_graph=True) for x in (out, exact))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    opcheck = torch.library.opcheck
    checks = ("test_schema", "test_faketensor")
    opcheck(backward.shifted_attention_op, (*leaves, *arguments), test_utils=checks)
    mask, *pattern = arguments
    kept = (mask, out.detach(), torch.zeros(2, 4, 16))
    opcheck(backward.shifted_attention_backward_op, (grad, q, k, v, *kept, *pattern), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": torch.zeros(1, 2, 9, 16)}, "a prefix or a cache"),
        ({"v": torch.zeros(1, 2, 8, 24)}, "16 and 24 values"),
        ({"q": torch.zeros(1, 2, 8, 16, dtype=torch.float64)}, "torch.float64"),
        ({"q": torch.zeros(1, 2, 16, 8).transpose(2, 3)}, "not contiguous"),
        ({"pattern": Pattern(0.3, 4, causal=False, window=2)}, "window on both sides"),
    ],
)
def test_refused(change: dict[str, object], reason: str) -> None:
    plain = dict.fromkeys(("q", "k", "v"), torch.zeros(1, 2, 8, 16))
    assert forward.can_use(**plain, pattern=Pattern(0.3, 4)) == ""
    assert reason in forward.can_use(**{**plain, "pattern": Pattern(0.3, 4), **change})  # type: ignore[arg-type]
