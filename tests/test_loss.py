"""The chunked loss equals F.cross_entropy over whole logits: values, gradients, dtypes, edge cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from surgeon.loss import causal_cross_entropy, linear_cross_entropy


def _inputs(
    n: int = 37, h: int = 16, v: int = 53, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(n, h, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, h, dtype=dtype, requires_grad=True)
    bias = torch.randn(v, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    labels[::4] = -100
    return hidden, weight, bias, labels


def _plain(hidden, weight, bias, labels, scale=None, softcap=None):  # type: ignore[no-untyped-def]
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    if scale is not None:
        logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize(("scale", "softcap"), [(None, None), (0.25, None), (None, 3.0), (0.5, 3.0)])
def test_value_and_gradients_equal_cross_entropy(chunk: int, scale: float | None, softcap: float | None) -> None:
    inputs = _inputs(dtype=torch.float64)
    loss = linear_cross_entropy(*inputs, chunk_tokens=chunk, scale=scale, softcap=softcap)
    expected = _plain(*inputs, scale=scale, softcap=softcap)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(loss * 3, inputs[:3])
    want = torch.autograd.grad(expected * 3, inputs[:3])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("scale", "softcap"), [(None, None), (0.5, 3.0)])
def test_gradcheck(scale: float | None, softcap: float | None) -> None:
    hidden, weight, bias, labels = _inputs(6, 4, 7, torch.float64)

    def loss(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(h, w, b, labels, chunk_tokens=4, scale=scale, softcap=softcap)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_fp32_rounding() -> None:
    inputs = _inputs(200, 64, 500)
    loss = linear_cross_entropy(*inputs, chunk_tokens=64)
    expected = _plain(*inputs)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    for a, b in zip(torch.autograd.grad(loss, inputs[:3]), torch.autograd.grad(expected, inputs[:3]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "bf16 model"])
def test_bf16(pure: bool) -> None:
    hidden, weight, bias, labels = _inputs(100, 32, 200)
    exact = _plain(hidden, weight, bias, labels)
    if pure:
        hidden, weight, bias = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not pure):
        loss = linear_cross_entropy(hidden, weight, bias, labels, chunk_tokens=32)
        plain = _plain(hidden, weight, bias, labels)
    assert loss.dtype == torch.float32
    assert abs(loss - exact) <= 2 * abs(plain - exact) + 1e-2
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert [g.dtype for g in grads] == [hidden.dtype, weight.dtype, bias.dtype]
    for a, b in zip(grads, torch.autograd.grad(plain, (hidden, weight, bias)), strict=True):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


def test_nothing_to_learn_gives_zero() -> None:
    hidden, weight, bias, labels = _inputs()
    loss = linear_cross_entropy(hidden, weight, bias, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert all(t.grad is not None and not t.grad.any() for t in (hidden, weight, bias))


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight, _, labels = _inputs()
    linear_cross_entropy(hidden, weight.detach(), None, labels).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert not hidden.grad[::4].any(), "ignored tokens have no gradient"


def test_ignored_rows_are_not_computed() -> None:
    hidden, weight, bias, labels = _inputs()
    poisoned = hidden.detach().clone()
    poisoned[labels == -100] = float("nan")
    loss = linear_cross_entropy(poisoned.requires_grad_(), weight, bias, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()


def test_num_items_adds_up_over_micro_batches() -> None:
    hidden, weight, bias, labels = _inputs(dtype=torch.float64)
    items = (labels != -100).sum()
    parts = [
        linear_cross_entropy(hidden[part], weight, bias, labels[part], num_items=items)
        for part in (slice(0, 11), slice(11, None))
    ]
    torch.testing.assert_close(parts[0] + parts[1], _plain(hidden, weight, bias, labels))


def test_causal_shift() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 9, 8), torch.randn(20, 8)
    labels = torch.randint(0, 20, (3, 9))
    expected = F.cross_entropy((hidden @ weight.t())[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(causal_cross_entropy(hidden, weight, None, labels), expected)


def test_without_gradients() -> None:
    hidden, weight, bias, labels = _inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, bias, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, _plain(hidden, weight, bias, labels))


def test_whole_logits_are_never_held() -> None:
    """The largest tensor of the forward and backward pass is a chunk of logits, not all of them."""
    hidden, weight, _, labels = _inputs(512, 8, 300)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // 4)
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, None, labels, chunk_tokens=32).backward()
    assert largest <= 32 * 300
