"""`surgeon passes`: every registered pass, documented from its own file, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from surgeon.cli.main import main
from surgeon.passes import PASSES
from surgeon.presets import PRESETS


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["passes"]) == set(PASSES)
    assert main(["passes"]) == 0
    listed = capsys.readouterr().err
    assert all(name in listed for name in (*PASSES, *PRESETS))


@pytest.mark.parametrize("name", ["longlora", "qa-lora"])
def test_a_preset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["passes"]) == 2
    assert "et al." in found["summary"]


def test_the_nearest_of_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "long-lora"]) == 2
    assert "nearest: longlora" in capsys.readouterr().err


@pytest.mark.parametrize("name", PASSES)
def test_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == name
    assert found["equation"]
    assert main(["passes", name]) == 0
    page = capsys.readouterr().err
    assert all(option["name"].replace("_", "-") in page for option in found["options"])


def test_vera_says_what_it_inserts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "vera"]) == 0
    assert "x → A → ⊙ λ_d → B → ⊙ λ_b → + y." in capsys.readouterr().err


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["passes", "vra"]) == 2
    assert "nearest: vera" in capsys.readouterr().err


def test_no_torch() -> None:
    code = "import sys; from surgeon.cli.main import main; main(['passes', 'lora']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
