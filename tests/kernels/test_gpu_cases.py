"""The cases that a GPU is to measure, at small sizes in the interpreter: each agrees with float64."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.case import Case, cases, error


@pytest.mark.parametrize("case", cases(torch.device("cpu"), small=True), ids=lambda case: f"{case.kernel} {case.shape}")
def test_agrees_with_float64(case: Case) -> None:
    assert error(case, case.run) <= case.tolerance
    for name, run in case.libraries.items():
        assert error(case, run) <= case.tolerance, name
    assert case.flops + case.moved > 0


def test_no_gpu_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert capsys.readouterr().out == "no GPU is available: nothing is measured\n"


def test_a_failing_kernel_is_a_row() -> None:
    """And the command goes on with the next."""

    def broken() -> torch.Tensor:
        raise RuntimeError("out of shared memory")

    exact = torch.ones(3, dtype=torch.float64)
    row = command.checked(Case("broken", "3", broken, lambda: exact, 1e-3, {"library": lambda: exact * 1.5}))
    assert row["failure"] == "RuntimeError: out of shared memory"
    assert row["library_errors"] == {"library": 0.5}
    assert "out of shared memory" in command.line(row)
    wrong = command.checked(Case("nan", "3", lambda: exact * float("nan"), lambda: exact, 1e-3))
    assert wrong["error"] == float("inf")
