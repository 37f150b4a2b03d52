"""`surgeon generate` from the command line, on the shared Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgeon.cli.main import main


@pytest.fixture
def llama(shared: Path) -> str:
    return str(shared / "models" / "pystdlib-llama")


def test_prompts_are_continued(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", llama, "--prompt", "import os", "--prompt", "def main(", "--tokens", "8", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == ["import os", "def main("]
    assert all(found["texts"])
    assert main(["generate", llama, "--prompt", "def main(", "--tokens", "8"]) == 0
    assert capsys.readouterr().out == f"def main({found['texts'][1]}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no prompt"),
        (["--prompt", "x", "--tokens", "0"], "--tokens is 0"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature is -1"),
        (["--prompt", "x", "--top-p", "1.5"], "--top-p is 1.5"),
        (["--prompt", "x", "--beams", "0"], "--beams is 0"),
    ],
)
def test_bad_options(llama: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", llama, *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith(said)
    assert len(lines) == 3
