"""NF4 and FP4 decoded by the kernel: the same bits as the reference."""

from __future__ import annotations

import pytest
import torch

from surgeon.kernels import nf4
from surgeon.numerics import KINDS, quantise_4bit


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 7), (1, 64), (5, 130), (40, 512)])
def test_same_bits(shape: tuple[int, int], kind: str, double: bool) -> None:
    """Any number of weights, blocks that are not full, more blocks than a program decodes."""
    stored = quantise_4bit(torch.randn(shape), kind, double=double)
    torch.testing.assert_close(
        nf4.launch(stored, torch.float32), nf4.reference(stored, torch.float32), rtol=2e-7, atol=0
    )


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.float16, 0.0), (torch.bfloat16, 2**-7)])
def test_rounded_once(dtype: torch.dtype, ulp: float) -> None:
    """To fp16 exactly; the interpreter truncates to bf16."""
    stored = quantise_4bit(torch.randn(6, 192))
    torch.testing.assert_close(nf4.launch(stored, dtype), nf4.reference(stored, dtype), rtol=ulp, atol=0)


def test_refused() -> None:
    stored = quantise_4bit(torch.randn(4, 64))
    assert nf4.can_use(stored, torch.float16) == ""
    assert "torch.float64" in nf4.can_use(stored, torch.float64)
    assert "blocks of 32" in nf4.can_use(quantise_4bit(torch.randn(4, 64), block=32), torch.float16)


def test_operator() -> None:
    """One node, with the reference on a CPU."""
    stored = quantise_4bit(torch.randn(6, 192), double=True)
    assert stored.nested is not None
    parts = (stored.codes, stored.absmax, stored.nested.scale, stored.nested.offset)
    arguments = (*parts, 6, 192, "nf4", torch.float16)
    assert torch.equal(nf4.nf4_dequantise(*arguments), nf4.reference(stored, torch.float16))
    torch.library.opcheck(nf4.nf4_dequantise, arguments, test_utils=("test_schema", "test_faketensor"))
