"""The cases that a GPU is to measure, at small sizes in the interpreter: each agrees with float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.case import Case, cases, error, results
from benchmarks.gpu.shifted_attention import Passes
from surgeon.kernels.shifted_attention import Pattern


@pytest.mark.parametrize("case", cases(torch.device("cpu"), small=True), ids=lambda case: f"{case.kernel} {case.shape}")
def test_agrees_with_float64(case: Case) -> None:
    exact = results(case.exact)
    assert error(case.run, exact) <= case.tolerance
    for name, run in case.libraries.items():
        assert error(run, exact) <= case.tolerance, name
    assert case.flops + case.moved > 0


def test_flex_attention_has_the_same_segments() -> None:
    """In torch's own reference, which computes all scores and says so."""
    q, k, v = (torch.randn(1, heads, 40, 16) for heads in (4, 2, 2))
    passed = Passes(q, k, v, q, Pattern(0.25, 15))
    with pytest.warns(UserWarning, match=r"without torch\.compile"):
        found = passed.flexible()
    torch.testing.assert_close(found, passed.exact_out().float(), atol=1e-5, rtol=1e-4)


def test_no_gpu_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert capsys.readouterr().out == "no GPU is available: nothing is measured\n"


def test_a_failing_kernel_is_a_row() -> None:
    """And the command goes on with the next."""

    def broken() -> torch.Tensor:
        raise RuntimeError("out of shared memory")

    exact = torch.ones(3, dtype=torch.float64)
    row = command.checked(Case("broken", "3", broken, lambda: exact, 1e-3))
    assert row["failure"] == "RuntimeError: out of shared memory"
    assert "out of shared memory" in command.line(row)
    wrong = command.checked(Case("nan", "3", lambda: exact * float("nan"), lambda: exact, 1e-3))
    assert wrong["error"] == float("inf")


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a device and a clock that are not there: numerics first, no time of a wrong kernel, one file."""
    exact = torch.ones(3, dtype=torch.float64)
    right = Case("right", "3", lambda: exact, lambda: exact, 1e-3, {"torch": lambda: exact}, 4e9, 8e6)
    wrong = Case("wrong", "3", lambda: 2 * exact, lambda: exact, 1e-3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla X (80GB)")
    monkeypatch.setattr(command, "cases", lambda device, small: [right, wrong])
    monkeypatch.setattr(command, "ceilings", lambda: {"bytes_per_s": 2e12, "flop_per_s": 8e14})
    monkeypatch.setattr(command, "milliseconds", lambda run: 0.02)
    assert command.main(["--out", str(tmp_path)]) == 1
    (path,) = tmp_path.iterdir()
    assert path.name == "tesla-x-80gb.json"
    found = json.loads(path.read_text())
    timed, untimed = found["cases"]
    assert timed["ms"] == timed["libraries_ms"]["torch"] == 0.02
    assert timed["roofline_ms"] == pytest.approx(0.005), "4 GFLOP at 800 TFLOP/s take longer than 8 MB at 2 TB/s"
    assert "ms" not in untimed
    said = capsys.readouterr().out
    assert "1 of 2 cases are right" in said
    assert command.main(["--out", str(tmp_path), "--kernel", "right"]) == 0
