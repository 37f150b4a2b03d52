"""What is made and not written in `docs/methods/*.md`: equation, diff, options, measured rows; and the README's tables.

    python -m benchmarks.docs_methods                                      # equations, diffs and options
    python -m benchmarks.docs_methods --results benchmarks/results/compare_{llama,minilm}.json

A page has the parts between `<!-- begin: name -->` and `<!-- end: name -->`; the rest is text. Diffs are of the tiny
models of `benchmarks/zoo`: `tests/test_docs_methods.py` makes them again. Measured rows are the output of `surgeon
compare`, of as many models as results are given; without any they stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES, README = ROOT / "docs/methods", ROOT / "README.md"
LINEARS = {"targets": "q_proj"}


@dataclass(frozen=True)
class Page:
    """What the generated parts of a page are made of.

    Attributes:
        method: pass or preset, as `--method` names it.
        options: of the diff, for layers of 32 features.
        family: of `benchmarks/zoo`, that the diff is of.
        documented: the passes whose options the page has, of a preset; LoRA's are on its own page.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    family: str = "llama"
    documented: tuple[str, ...] = ()


METHOD_PAGES: dict[str, Page] = {
    "prefix": Page("prefix", {"tokens": 4}),
    "prompt": Page("prompt", {"tokens": 4}),
    "ptuning_v2": Page("ptuning_v2", {"tokens": 4}, "bert"),
    "lora": Page("lora", {"rank": 4, **LINEARS}),
    "dylora": Page("dylora", {"rank": 4, **LINEARS}),
    "adalora": Page("adalora", {"rank": 4, **LINEARS}),
    "qlora": Page("qlora", {"rank": 4, **LINEARS}, documented=("nf4",)),
    "qa_lora": Page("qa_lora", {"rank": 4, **LINEARS}, documented=("intq", "qalora")),
    "longlora": Page("longlora", {"rank": 4}, documented=("shifted_sparse_attention",)),
    "vera": Page("vera", {"rank": 8, **LINEARS}),
}


def equations(page: Page) -> str:
    """What each pass of a method computes."""
    from surgeon.options import equation
    from surgeon.passes import find
    from surgeon.presets import passes_of

    return "\n>\n".join(f"> {equation(find(name))}" for name in passes_of(page.method))


def changes(page: Page) -> str:
    """The diff of a tiny model's graph, one layer of it."""
    from benchmarks.zoo.graphs import graph_of
    from surgeon import run
    from surgeon.presets import steps_of
    from surgeon.text import diff

    base = graph_of(page.family)
    lines = diff(base, run.apply(base, *steps_of(page.method, dict(page.options)))).splitlines()[2:]
    return "\n".join(["```diff", *lines, "```"])


def options(page: Page) -> str:
    """A table of the options."""
    from surgeon.options import options_of
    from surgeon.passes import find

    lines = ["| option | default | what it does |", "|---|---|---|"]
    for name in page.documented or (page.method,):
        for option in options_of(find(name)):
            default = f"`{option.default}`" if option.default not in ("", ()) else ""
            lines.append(f"| `{option.flag}` | {default} | {option.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def measured(page: Page, results: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a method in the results of `surgeon compare`, a table with a line per model."""
    head = ("model", "held-out loss", "fall", "trained", "file", "step", "memory", "merged", "4-bit", "ONNX", "PEFT")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        name = Path(result["settings"]["model"]).name
        row = next((row for row in result["rows"] if row["method"] == page.method), None)
        if row is None:
            why = result["not_compared"].get(page.method, "not compared")
            lines.append(f"| {name} | {why}" + " |" * (len(head) - 1))
        else:
            lines.append("| " + " | ".join([name, *_cells(row)]) + " |")
    return "\n".join(lines)


def overview(result: Mapping[str, Any]) -> str:
    """Every method of one comparison: a table of the README."""
    classes = result["settings"]["task"].endswith("classification")
    head = ["method", "trained", "file", *(["accuracy"] if classes else []), "held-out loss", "merged", "4-bit", "ONNX"]
    head += ["fall / PEFT's", "step / PEFT's", "memory / PEFT's"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in result["rows"]:
        cells = [row["method"], f"{row['trained']:,}", f"{row['checkpoint_bytes'] / 1e6:.2f} MB"]
        cells += [f"{row['accuracy']:.3f}"] if classes else []
        after = (row["after"].get(way) for way in ("merged", "4bit", "onnx"))
        cells += [_spread(row["loss"], 3), *(f"{loss:.3f}" if isinstance(loss, float) else "–" for loss in after)]
        peer = row["peer"] or {}
        ratios = [(peer.get(name), form) for name, form in (("reduction_ratio", ".3f"), ("time_ratio", ".2f"))]
        ratios.append((peer.get("memory_ratio"), ".2f"))
        cells += ["–" if ratio is None else f"{ratio:{form}}" for ratio, form in ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    after = [row["after"].get(way) for way in ("merged", "4bit", "onnx")]
    peer = row["peer"]
    return [
        _spread(row["loss"]),
        _spread(row["reduction"]),
        f"{row['trained']:,}",
        f"{row['checkpoint_bytes'] / 1e6:.2f} MB",
        f"{1000 * row['seconds_per_step']:.0f} ms",
        f"{row['memory_bytes'] / 1e6:.0f} MB",
        *(f"{value:.4f}" if isinstance(value, float) else "–" for value in after),
        "–" if peer is None else f"{peer['reduction_ratio']:.3f} × its fall, {peer['time_ratio']:.2f} × its time",
    ]


def _spread(value: Mapping[str, float], digits: int = 4) -> str:
    return f"{value['mean']:.{digits}f} ± {value['deviation']:.{digits}f}"


def filled(text: str, parts: Mapping[str, str]) -> str:
    """A page with its parts made anew.

    Raises:
        SystemExit: it lacks the marks of a part.
    """
    for name, made in parts.items():
        pattern = re.compile(rf"(<!-- begin: {name} -->\n).*?(\n?<!-- end: {name} -->)", re.DOTALL)
        found = pattern.search(text)
        if found is None:
            raise SystemExit(f"the page has no part '{name}'")
        text = text[: found.end(1)] + made + "\n" + text[found.start(2) :].removeprefix("\n")
    return text


def parts_of(page: Page) -> dict[str, str]:
    """What follows from the code."""
    return {"equation": equations(page), "diff": changes(page), "options": options(page)}


def main() -> None:
    """Fill every page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", nargs="+", type=Path, default=[])
    results = [json.loads(file.read_text(encoding="utf-8")) for file in parser.parse_args().results]
    for name, page in METHOD_PAGES.items():
        file = PAGES / f"{name}.md"
        parts = parts_of(page) | ({"measured": measured(page, results)} if results else {})
        file.write_text(filled(file.read_text(encoding="utf-8"), parts), encoding="utf-8")
        print(f"wrote {file.name}")
    if results:
        tables = {f"compared, {Path(result['settings']['model']).name}": overview(result) for result in results}
        README.write_text(filled(README.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
