"""Products with frozen weights equal torch's, whatever kernel computes them."""

from __future__ import annotations

import pytest
import torch

from surgeon.products import ROWS, add_times, times, times_transposed


@pytest.mark.parametrize("rows", [1, ROWS - 1, ROWS, 3 * ROWS + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_torch(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, g, w, bias = (torch.randn(shape, dtype=dtype) for shape in ((rows, 24), (rows, 40), (40, 24), (40,)))
    exact = [t.double() for t in (x, g, w, bias)]
    near = {"rtol": 2e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(times_transposed(x, w, bias).double(), exact[0] @ exact[2].T + exact[3], **near)
    torch.testing.assert_close(times(g, w).double(), exact[1] @ exact[2], **near)
    torch.testing.assert_close(add_times(x.clone(), g, w).double(), exact[0] + exact[1] @ exact[2], **near)


def test_strided_inputs() -> None:
    x, w = torch.randn(24, 2 * ROWS).t(), torch.randn(24, 40).t()
    torch.testing.assert_close(times_transposed(x, w), x @ w.t(), rtol=1e-4, atol=1e-4)
    g = torch.randn(40, 2 * ROWS).t()
    torch.testing.assert_close(times(g, w), g @ w, rtol=1e-4, atol=1e-4)
