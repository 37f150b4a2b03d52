"""loss.jsonl, its plot and the bar."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgeon.loss_log import LossLog, ProgressBar, plot_log, read_log


def test_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    log = LossLog(path)
    for step in range(1, 5):
        log.add(step=step, loss=1.0 / step, lr=1e-3)
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    LossLog(path, 3).add(step=4, eval_loss=0.5)
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 4]
    plot_log(path, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert read_log(LossLog(path).path) == []


def test_a_line_for_every_tenth_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(20, 0, True)
    for step in range(1, 21):
        bar.step(step, 2.5, 1234.0)
    bar.close()
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("step")]
    assert len(lines) == 10
    assert lines[-1] == "step 20/20: loss 2.5000, 1,234 tokens/s"
    assert captured.out == ""
