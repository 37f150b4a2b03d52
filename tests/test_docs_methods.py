"""The made parts of `docs/methods` are what the code makes today, and every method has a page."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks.docs_methods import METHOD_PAGES, PAGES, filled, measured, parts_of

HINT = "python -m benchmarks.docs_methods makes them anew"


@pytest.mark.parametrize("name", METHOD_PAGES)
def test_a_page_is_up_to_date(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    parts = parts_of(METHOD_PAGES[name])
    assert parts["diff"].count("\n+") >= 1
    assert filled(text, parts) == text, HINT


def test_every_method_has_a_page_with_its_parts() -> None:
    pages = {file.stem for file in PAGES.glob("*.md")} - {"README"}
    assert pages == {*METHOD_PAGES, "slora"}
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert {f"{name}.md" for name in pages} == set(re.findall(r"\((\w+\.md)\)", index))
    for name in pages:
        text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert "## When to use it" in text
        assert "## Source" in text


def test_measured_rows() -> None:
    number = {"mean": 2.0, "deviation": 0.01}
    row: dict[str, Any] = {
        "method": "lora", "loss": number, "reduction": number, "trained": 1000, "checkpoint_bytes": 4096,
        "seconds_per_step": 0.25, "memory_bytes": 2e8, "after": {"merged": 2.0, "4bit": 2.1, "onnx": "no form"},
        "peer": {"reduction_ratio": 1.01, "time_ratio": 0.5},
    }  # fmt: skip
    result = {"settings": {"model": "/models/tiny"}, "rows": [row], "not_compared": {"vera": "it does not fit"}}
    lines = measured(METHOD_PAGES["lora"], [result]).splitlines()
    assert lines[2].startswith("| tiny | 2.0000 ± 0.0100 |")
    assert "| 2.0000 | 2.1000 | – | 1.010 × its fall, 0.50 × its time |" in lines[2]
    assert "it does not fit" in measured(METHOD_PAGES["vera"], [result])
    assert len({line.count("|") for line in lines}) == 1


def test_a_page_without_a_part_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no part 'diff'"):
        filled("# nothing", {"diff": "x"})
