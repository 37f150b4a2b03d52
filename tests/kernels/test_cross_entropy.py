"""Cross-entropy and its gradient over logits, in the interpreter, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from surgeon.kernels import cross_entropy

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def exact(logits, labels, bias, scale, softcap):  # type: ignore[no-untyped-def]
    """Losses and their gradient, written with torch's own functions."""
    leaf = logits.double().requires_grad_()
    z = scale * (leaf if bias is None else leaf + bias.double())
    z = softcap * torch.tanh(z / softcap) if softcap else z
    losses = F.cross_entropy(z, labels, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize(
    ("tokens", "words", "dtype", "biased", "scale", "softcap"),
    [
        (3, 1, torch.float32, False, 1.0, 0.0),
        (5, 77, torch.float32, True, 1.0, 0.0),
        (2, 4096, torch.float32, False, 0.5, 30.0),
        (3, 9001, torch.float32, True, 0.25, 3.0),
        (4, 5000, torch.float16, False, 1.0, 0.0),
        (4, 5000, torch.bfloat16, False, 1.0, 50.0),
    ],
)
@pytest.mark.parametrize("gradient", [True, False])
def test_losses_and_gradient(
    tokens: int, words: int, dtype: torch.dtype, biased: bool, scale: float, softcap: float, gradient: bool
) -> None:
    """Vocabularies below, at and above a block, logits of any size, rows of something wider."""
    logits = (20 * torch.randn(tokens, words + 3)).to(dtype)[:, :words]
    labels = torch.randint(words, (tokens,))
    bias = torch.randn(words).to(dtype) if biased else None
    given = logits.clone()
    losses, slope = exact(given, labels, bias, scale, softcap)
    for run in (cross_entropy.launch, cross_entropy.reference):
        logits.copy_(given)
        assert cross_entropy.can_use(logits, bias) == ""
        got = run(logits, labels, bias, scale, softcap, gradient)
        torch.testing.assert_close(got.double(), losses, rtol=1e-5, atol=2e-5)
        if gradient:
            assert (logits - slope).abs().max() <= TOLERANCE[dtype]
        else:
            assert torch.equal(logits, given)


def test_operator() -> None:
    logits, labels = torch.randn(3, 10), torch.randint(10, (3,))
    losses, slope = exact(logits, labels, None, 1.0, 0.0)
    arguments = (labels, None, 1.0, 0.0, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(cross_entropy.cross_entropy_, (logits.clone(), *arguments), test_utils=checks)
    torch.testing.assert_close(cross_entropy.cross_entropy_(logits, *arguments), losses.float())
    torch.testing.assert_close(logits, slope.float())


def test_refused() -> None:
    assert "torch.float64" in cross_entropy.can_use(torch.zeros(2, 3, dtype=torch.float64), None)
    assert "not contiguous" in cross_entropy.can_use(torch.zeros(3, 2).t(), None)
