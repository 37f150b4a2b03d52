"""`surgeon quantise`: the method that a form or an option means, what is said, and refusals as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surgeon.cli.main import main

pytestmark = pytest.mark.usefixtures("captured_once")


def quantise(*args: object) -> int:
    return main(["quantise", *map(str, args)])


def test_the_form_or_an_option_says_the_method(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantise(tiny_llama, "-o", tmp_path / "nf4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["form"], found["method"], found["max_error"]) == ("bitsandbytes", "nf4", 0)
    assert quantise(tiny_llama, "-o", tmp_path / "three", "--bits", "3", "--group", "32") == 0
    said = capsys.readouterr().err
    assert "surgeon, intq(bits=3)" in said
    assert "no whole number of groups of 32 (try --group 16)" in said  # down_proj has 48 inputs
    assert "read again, max |Δ| 0" in said


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("--format", "awq"), "there is no form 'awq'"),
        (("--format", "gptq", "--method", "nf4"), "nf4 makes none"),
        (("--format", "bitsandbytes", "--bits", "4"), "intq makes none"),
        (("--method", "lora"), "lora is no way to quantise"),
        (("--method", "qlora"), "nf4 and lora is no way to quantise"),
        (("--bits", "5"), "no codes of 5 bits"),
        (("--group", "11"), "no whole number of groups of 11 (try --group 32)"),
        (("--bits", "4", "--calibration", "none.jsonl"), "no tokenizer"),
    ],
)
def test_refusals_say_what_where_and_what_to_try(
    args: tuple[str, ...], what: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantise(tiny_llama, "-o", tmp_path / "out", *args) in (2, 3)
    said = capsys.readouterr().err
    assert what in said
    assert "where:" in said
    assert "try:" in said
    assert not list(tmp_path.iterdir())


def test_what_is_quantised_is_not_quantised_again(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantise(tiny_llama, "-o", tmp_path / "nf4") == 0
    assert quantise(tmp_path / "nf4", "-o", tmp_path / "out", "--bits", "3") == 2
    assert "quantised already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
