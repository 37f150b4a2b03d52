"""What commands print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from surgeon.cli import output


@dataclass
class Site:
    path: str
    shape: tuple[int, int]


def test_plain_converts_what_commands_report() -> None:
    value = {
        "site": Site("layers.0.q_proj", (4, 8)),
        "folder": Path("a/b"),
        "names": {"b", "a"},
        "error": np.float32(0.5),
        "counts": np.array([1, 2]),
        "nothing": None,
        "yes": True,
        3: "key",
    }
    assert output.plain(value) == {
        "site": {"path": "layers.0.q_proj", "shape": [4, 8]},
        "folder": "a/b",
        "names": ["a", "b"],
        "error": 0.5,
        "counts": [1, 2],
        "nothing": None,
        "yes": True,
        "3": "key",
    }


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float64("-inf")])
def test_emit_never_writes_what_json_does_not_have(number: float, capsys: pytest.CaptureFixture[str]) -> None:
    output.emit({"error": number}, json=True)
    assert json.loads(capsys.readouterr().out) == {"error": None}


def test_emit_is_one_line_of_json_with_its_own_letters(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit({"text": "‖Δ‖ [bold]x[/bold]\n"}, json=True)
    out, err = capsys.readouterr()
    assert (out.count("\n"), err) == (1, "")
    assert json.loads(out) == {"text": "‖Δ‖ [bold]x[/bold]\n"}
    assert "‖Δ‖" in out


def test_say_shows_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output.say("shape [2, 3] of [bold]")
    assert capsys.readouterr() == ("", "shape [2, 3] of [bold]\n")


def test_table_shows_cells_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    output.say(output.table("", ("site", "size"), [("layers.[0]", 12), ("head", 3)], right=["size"]))
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[0].split() == ["site", "size"]
    assert lines[2].split() == ["layers.[0]", "12"]
    assert lines[3].endswith("   3")


def test_write_goes_to_the_reserved_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with output.reserved_stdout():
        print("noise")
        with output.reserved_stdout():
            output.write("product\n")
    print("after")
    assert capsys.readouterr() == ("product\nafter\n", "noise\n")


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (13_476_000_000, "13.5 GB"), (999_960, "1.0 MB"), (2e17, "200 PB")],
)
def test_size(count: float, shown: str) -> None:
    assert output.size(count) == shown
