"""`surgeon compare` without training: the plan of runs, results that are kept, the table, the page, bad input."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.zoo.graphs import graph_of
from surgeon.cli import compare as command
from surgeon.cli.compare_page import render
from surgeon.cli.main import main
from surgeon.compare import rows as table
from surgeon.compare import schedule, settings
from surgeon.compare.contenders import CONTENDERS, FULL, HEAD, chosen, fitted
from surgeon.compare.schedule import BESIDE, PACE, PEFT, SEARCH, SURGEON, Results, Run
from surgeon.errors import SurgeonError, UsageError

BASE = {"loss": 3.0, "parameters": 1000, "seconds_per_step": 0.5, "evaluation_seconds": 2.0, "startup_seconds": 8.0}
SETTINGS = settings.Settings("model", "train.jsonl", "heldout.jsonl", "", 20, 5)
NAMES = ("lora", "prompt", FULL)


def found(run: Run) -> dict[str, Any]:
    """What a run might have found."""
    if run.kind == SEARCH:
        return {"lr": 1e-3, "tried": {"0.001": 2.5}}
    if run.kind in (PACE, BESIDE):
        beside = {"time_ratio": 0.5} if run.kind == BESIDE else {}
        return {"lr": 1e-3, "seconds_per_step": 0.2, **beside}
    loss = 2.0 + 0.1 * run.seed + 0.3 * NAMES.index(run.method)
    result = {"loss": loss, "lr": 1e-3, "trained": 100, "memory_bytes": 10**7}
    if run.kind == PEFT:
        return {**result, "loss": loss + 0.5}
    after = {"merged": loss, "4bit": loss + 0.1, "onnx": "no <form>"}
    diff = "--- before\n+++ after\n@@ layer\n+ <new>\n" if not run.seed else ""
    return {**result, "stored": 100, "checkpoint_bytes": 400, "after": after, "diff": diff}


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the runs that were started, which find something at once."""
    begun: list[str] = []

    def made(_: Any, run: Run, lr: float) -> dict[str, Any]:
        begun.append(run.key)
        assert lr == (0.0 if run.kind in (SEARCH, "base") else 1e-3)
        return dict(BASE) if run.kind == "base" else found(run)

    monkeypatch.setattr(schedule, "in_process", made)
    return begun


def test_every_method_is_a_contender_and_fits_its_model() -> None:
    llama, bert = graph_of("llama"), graph_of("bert")
    reasons = {one.name: fitted(llama, one)[1] for one in chosen(["all"])}
    assert {name for name, why in reasons.items() if why} == {HEAD}
    assert "no head" in reasons[HEAD]
    assert not fitted(bert, CONTENDERS[HEAD])[1]
    small, why = fitted(llama, CONTENDERS["qlora"])
    assert not why
    assert small.options["rank"] / small.options["alpha"] == 0.5


def test_ranks_are_halved_until_a_layer_can_have_them() -> None:
    one, why = fitted(
        graph_of("llama"),
        schedule.Run(SURGEON, "lora", (("rank", 64), ("alpha", 128.0), ("targets", "all-linear"))).contender,
    )
    assert not why
    assert (one.options["rank"], one.options["alpha"]) == (16, 32.0)


def test_what_was_killed_goes_on_and_gives_the_same_table(tmp_path: Path, processes: list[str]) -> None:
    contenders = chosen(NAMES)
    runs = list(schedule.runs(contenders, 2, peers=True))
    assert len(runs) == 3 * (1 + 2 + 1) + 2 * 2

    def carry(wanted: list[Run]) -> None:
        schedule.carry_out(SETTINGS, wanted, Results(tmp_path), lambda *_: None, lambda _: None)

    carry(runs[:4])
    carry(runs)
    assert processes == [run.key for run in runs]
    first = table.rows(contenders, BASE, Results(tmp_path), 2)
    carry(runs)
    assert table.rows(contenders, BASE, Results(tmp_path), 2) == first
    best = first[0][0]
    assert (best.method, best.loss.mean, best.seeds) == ("lora", 2.05, 2)
    assert best.reduction.mean == pytest.approx(0.95)
    assert best.loss.deviation == pytest.approx(0.0707, abs=1e-3)
    assert best.peer is not None
    assert (best.peer.time_ratio, best.peer.memory_ratio) == (0.5, 1.0)
    assert best.peer.reduction_ratio == pytest.approx(0.95 / 0.45)
    assert first[0][-1].peer is None


def test_a_run_of_another_learning_rate_is_carried_out_again(tmp_path: Path, processes: list[str]) -> None:
    runs, results = list(schedule.runs(chosen(["lora"]), 2, peers=True)), Results(tmp_path)
    schedule.carry_out(SETTINGS, runs, results, lambda *_: None, lambda _: None)
    results.write(runs[2], {**found(runs[2]), "lr": 3e-3})
    processes.clear()
    schedule.carry_out(SETTINGS, runs, results, lambda *_: None, lambda _: None)
    assert processes == [runs[2].key]


def test_a_method_that_fails_is_listed_and_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def made(_: Any, run: Run, lr: float) -> dict[str, Any]:
        begun.append(run.key)
        return {"failed": "no room"} if run.method == "lora" else found(run)

    monkeypatch.setattr(schedule, "in_process", made)
    contenders = chosen(["lora", "prompt"])
    schedule.carry_out(
        SETTINGS, list(schedule.runs(contenders, 1, peers=False)), Results(tmp_path), lambda *_: None, lambda _: None
    )
    assert begun == ["lora-search", "prompt-search", "prompt-surgeon-0", "prompt-pace"]
    rows, failed = table.rows(contenders, BASE, Results(tmp_path), 1)
    assert ([row.method for row in rows], failed) == (["prompt"], {"lora": "no room"})


def test_the_terminal_shows_peft_in_a_table_of_its_own(tmp_path: Path, processes: list[str]) -> None:
    contenders = chosen(NAMES)
    runs = list(schedule.runs(contenders, 2, peers=True))
    schedule.carry_out(SETTINGS, runs, Results(tmp_path), lambda *_: None, lambda _: None)
    rows, _ = table.rows(contenders, BASE, Results(tmp_path), 2)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(command.table(rows, {"head": "it has none"}, BASE))
    own, beside = console.export_text().split("beside PEFT: same first values, data, order, steps and rates")
    assert "2.0500 ± 0.0707" in own
    told = next(line.split() for line in beside.splitlines() if line.split()[:1] == ["lora"])
    assert told == ["lora", "0.9500", "0.4500", "2.111", "0.500", "1.000"]
    assert "not compared: head: it has none" in beside


class Page(HTMLParser):
    """What a page would load, and its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")
        ]


def test_the_page_needs_nothing_else(tmp_path: Path, processes: list[str]) -> None:
    contenders = chosen(NAMES)
    schedule.carry_out(
        SETTINGS, list(schedule.runs(contenders, 2, peers=True)), Results(tmp_path), lambda *_: None, lambda _: None
    )
    rows, failed = table.rows(contenders, BASE, Results(tmp_path), 2)
    html = render(SETTINGS, BASE, rows, failed, {"head": "it has <none>"})
    page = Page()
    page.feed(html)
    assert [link for link in page.loads if "://" in link] == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 2
    assert "it has &lt;none&gt;" in html
    assert "+ &lt;new&gt;" in html
    assert "2.0500 ± 0.0707" in html
    assert "no &lt;form&gt;" in html
    assert html == render(SETTINGS, BASE, rows, failed, {"head": "it has <none>"})


def test_steps_are_what_the_budget_allows() -> None:
    few, many = (command.affordable(BASE, 2, 1, peers=False, budget=budget) for budget in (60, 600))
    assert few == command.LEAST
    assert many > few
    assert many * BASE["seconds_per_step"] * (2 + 2 * 3) <= 600
    assert [settings.seconds(text) for text in ("90", "90s", "10m", "2h")] == [90, 90, 600, 7200]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Training and held-out rows that share none."""
    paths = tmp_path / "train.jsonl", tmp_path / "heldout.jsonl"
    for path, first, count in zip(paths, (0, 100), (16, 4), strict=True):
        path.write_text("".join(json.dumps({"text": f"row {first + i}"}) + "\n" for i in range(count)))
    return paths


def answer(*args: object) -> int:
    return main(["compare", *map(str, args)])


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--methods", "lorra"), "unknown method 'lorra'"),
        (("--methods", "slora"), "it serves adapters"),
        (("--budget", "soon"), "'soon' is no time"),
        (("--peers", "unsloth"), "unknown peer 'unsloth'"),
        (("--batch-size", "17"), "16 rows, fewer than a batch of 17"),
        (("--methods", "head"), "no method of head fits the model"),
    ],
)
def test_bad_input(
    tiny: Path, files: tuple[Path, Path], tmp_path: Path, extra: tuple[str, ...], said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert answer(tiny, "--data", files[0], "--heldout", files[1], "-o", out, *extra) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 3
    assert not out.exists()


def test_overlap_is_counted(tiny: Path, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with files[1].open("a") as stream:
        stream.write('{"text": "row 3"}\n{"text": "row 7"}\n')
    assert answer(tiny, "--data", files[0], "--heldout", files[1]) == 2
    assert "2 of the 6 held-out rows are in the training data too" in capsys.readouterr().err


def test_the_search_is_judged_by_rows_from_all_of_a_sorted_file() -> None:
    trained, judged = settings.validation_of([(label, number) for label in range(8) for number in range(300)])
    assert (len(trained), len(judged)) == (2400 - settings.VALIDATION, settings.VALIDATION)
    assert {label for label, _ in judged} == set(range(8))
    assert not {*trained} & {*judged}
    assert trained == sorted(trained)
    assert [len(part) for part in settings.validation_of(range(5))] == [4, 1]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    settings.write(SETTINGS, tmp_path)
    assert settings.read(tmp_path) == SETTINGS
    other = settings.Settings("model", "other.jsonl", "heldout.jsonl", "", 20, 5)
    with pytest.raises(UsageError, match="another data"):
        command._begun(other, tmp_path, [], 1, False, 60.0, None)  # type: ignore[arg-type]
    (tmp_path / settings.SETTINGS).write_text("{")
    with pytest.raises(UsageError, match="cannot be read"):
        settings.read(tmp_path)


@pytest.mark.parametrize(
    ("signal", "said"), [(9, "killed by SIGKILL"), (0, "OSError: no such thing")], ids=["killed", "failed"]
)
def test_a_process_that_ends_without_a_result(monkeypatch: pytest.MonkeyPatch, signal: int, said: str) -> None:
    monkeypatch.setattr(schedule, "_processes", lambda: multiprocessing.get_context("fork"))
    monkeypatch.setattr("surgeon.compare.one.answer", lambda _, place: ends(place, signal))
    with pytest.raises(SurgeonError, match=f"ended without a result: {said}"):
        schedule.in_process(SETTINGS, Run(SURGEON, "lora"), 1e-3)


def ends(place: str, signal: int) -> None:
    """A run that writes no result."""
    if signal:
        os.kill(os.getpid(), signal)
    (Path(place) / schedule.WORDS).write_text("a warning\nOSError: no such thing\n")
