"""A comparison on real processes, killed and begun again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.encoder import save_encoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("killed")
    model = save_encoder(place / "encoder")
    rows = [(f"{word} {thing}", kind) for thing in ("film", "tower", "house", "river", "good", "bad", "dull", "great")
            for word, kind in (("good", "pos"), ("lovely", "pos"), ("awful", "neg"), ("dull", "neg"))]  # fmt: skip
    for name, part in (("train", rows[:24]), ("heldout", rows[24:])):
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in part)
        (place / f"{name}.jsonl").write_text("".join(lines))
    files = ["--data", str(place / "train.jsonl"), "--heldout", str(place / "heldout.jsonl")]
    options = [
        "--task",
        "sequence-classification",
        "--methods",
        "lora,ia3",
        "--seeds",
        "1",
        "--steps",
        "4",
        "--no-onnx",
    ]
    return [sys.executable, "-m", "surgeon", "compare", str(model), *files, *options, "--batch-size", "4", "-o"]


def table(folder: Path) -> list[Any]:
    """What does not depend on how busy the machine is."""
    timed = ("seconds_per_step", "memory_bytes")
    rows = json.loads((folder / "compare.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.mark.timeout(900)
def test_a_comparison_that_was_killed_gives_the_same_table(command: list[str], tmp_path: Path) -> None:
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and len(list((killed / "runs").glob("*.json"))) < 3:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    known = {file.name: file.stat().st_mtime_ns for file in (killed / "runs").glob("*.json")}
    assert len(known) == 3, "it was to be killed in the middle"
    assert not (killed / "compare.json").exists()
    subprocess.run([*command, str(killed)], check=True, capture_output=True)
    assert {name: (killed / "runs" / name).stat().st_mtime_ns for name in known} == known
    assert table(killed) == table(tmp_path / "whole")
