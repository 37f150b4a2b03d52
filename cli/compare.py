"""`surgeon compare`: every method on equal data, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import output
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from surgeon.compare.contenders import Contender
    from surgeon.compare.rows import Row
    from surgeon.compare.schedule import Result, Results, Run
    from surgeon.compare.settings import Settings

LEAST, MOST = 10, 2000
PAGE, RESULTS = "compare.html", "compare.json"


def command(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or hub id.")],
    data: Annotated[Path, typer.Option(help="To train on: JSONL, JSON, CSV or Parquet.")] = ...,  # type: ignore[assignment]
    heldout: Annotated[Path, typer.Option(help="To measure on; no row of it may be in the training data.")] = ...,  # type: ignore[assignment]
    methods: Annotated[str, typer.Option(help="Names, separated by commas, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="Runs of each method.", min=1)] = 3,
    budget: Annotated[str, typer.Option(help="About how long it may take: 90s, 10m, 2h.")] = "10m",
    steps: Annotated[int, typer.Option(help="Steps of a run; as many as the budget allows if not given.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples of a step.", min=1)] = 8,
    max_length: Annotated[int, typer.Option(help="Cut samples to this many tokens.", min=8)] = 256,
    peers: Annotated[str, typer.Option(help="peft: the same runs through PEFT too, where it has the method.")] = "",
    task: Annotated[str, typer.Option(help="What the model is for; read off its config if not given.")] = "",
    onnx: Annotated[bool, typer.Option(help="Measure the loss after the ONNX export too.")] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results and page.")] = Path("compare"),
    json: output.Json = False,
) -> None:
    """Train every method on equal data, with its recommended settings, and write one table and one web page.

    A learning rate is searched for each method by short runs and confirmed by whole ones, on rows of the training data
    kept apart; then each is trained once per seed; every run is a process of its own.
    Results are kept: a second call goes on where the first was killed, and gives the same table. Methods that the model
    cannot have are listed with the reason. With --peers peft each method that PEFT has runs through PEFT as well: same
    first values, data, order, steps and learning rate.

    Examples:
        surgeon compare model/ --data train.jsonl --heldout heldout.jsonl
        surgeon compare model/ --data train.jsonl --heldout heldout.jsonl --methods lora,vera,full --seeds 1 --steps 50
        surgeon compare encoder/ --task sequence-classification --data train.csv --heldout test.csv --peers peft
    """
    from surgeon.compare import settings as conditions
    from surgeon.compare.contenders import chosen

    if peers not in ("", "peft"):
        raise UsageError(f"unknown peer '{peers}'", "--peers", "peft, or leave it out")
    seconds, wanted = conditions.seconds(budget), chosen([word for word in methods.split(",") if word])
    rows, _ = conditions.checked_data(data, heldout, batch_size)
    model = str(Path(model).absolute()) if Path(model).is_dir() else model
    contenders, left_out = _fitting(model, task, rows, wanted)
    given = conditions.Settings(
        model, str(data.absolute()), str(heldout.absolute()), task, steps, 0, batch_size, max_length, onnx
    )
    shown = _Shown(len(contenders), seeds, bool(peers), json)
    with shown:
        settings, base, results = _begun(given, out, contenders, seeds, bool(peers), seconds, shown)
        from surgeon.compare.schedule import carry_out, runs

        carry_out(settings, list(runs(contenders, seeds, bool(peers))), results, shown.done, shown.begin)
    _report(settings, base, results, contenders, left_out, seeds, out, json)


def _fitting(model: str, task: str, rows: Any, wanted: Sequence[Contender]) -> tuple[list[Contender], dict[str, str]]:
    """Those that the model can have, their ranks fitted to it, and why it cannot have the others.

    Raises:
        UsageError: it can have none.
    """
    from surgeon import api, labels
    from surgeon.compare.contenders import fitted

    graph = api.read(model, task or None)
    labels.chosen(rows, graph.config, graph.task, open_head=bool(graph.fresh) and not graph.labels)
    found = [(one.name, *fitted(graph, one)) for one in wanted]
    contenders = [one for _, one, why in found if not why]
    if not contenders:
        what = f"no method of {', '.join(one.name for one in wanted)} fits the model"
        raise UsageError(what, f"{found[0][0]}: {found[0][2]}", "other --methods, or another model")
    return contenders, {name: why for name, _, why in found if why}


def _begun(
    given: Settings,
    out: Path,
    contenders: Sequence[Contender],
    seeds: int,
    peers: bool,
    budget: float,
    shown: _Shown,
) -> tuple[Settings, Result, Results]:
    """The settings with their steps, the base's own result, and the results so far.

    Raises:
        UsageError: the folder has results of another comparison.
    """
    import dataclasses

    from surgeon.compare import settings as conditions
    from surgeon.compare.schedule import BASE, Results, Run, in_process
    from surgeon.errors import SurgeonError

    results, known, run = Results(out), conditions.read(out), Run(BASE)
    if known is not None:
        asked = dataclasses.replace(given, steps=given.steps or known.steps, search_steps=known.search_steps)
        if other := asked.same_as(known):
            what = f"the folder has results with another {other.replace('_', '-')}"
            raise UsageError(what, f"{out}: {getattr(known, other)}", "name another folder with -o, or delete this one")
        given = known
    base = results.read(run)
    if base is None:
        shown.begin(run)
        base = in_process(given, run, 0.0)
        if "failed" in base:
            raise SurgeonError(str(base["failed"]), given.model, "try surgeon eval on it first")
        results.write(run, base)
    if known is None:
        steps = given.steps or affordable(base, len(contenders), seeds, peers, budget)
        given = dataclasses.replace(given, steps=steps, search_steps=max(5, math.ceil(steps / 4)))
        conditions.write(given, out)
    return given, base, results


def affordable(base: Mapping[str, Any], methods: int, seeds: int, peers: bool, budget: float) -> int:
    """Steps of a run for which all runs take about `budget` seconds, as the base's own run was measured."""
    from surgeon.compare.schedule import PACES, ROUNDS

    sides = 2 if peers else 1
    finals = methods * seeds * sides
    around = (finals + 2 * methods) * base["startup_seconds"] + (finals + methods) * base["evaluation_seconds"]
    around += methods * 5 * base["evaluation_seconds"]  # of the rates that are searched, and when deployed
    around += methods * sides * ROUNDS * PACES * base["seconds_per_step"]
    per_step = base["seconds_per_step"] * (finals + 3 * methods)  # a search: four quarters of a run, and two whole ones
    return int(max(LEAST, min(MOST, (budget - around) / per_step)))


def _report(
    settings: Settings,
    base: Result,
    results: Results,
    contenders: Sequence[Contender],
    left_out: Mapping[str, str],
    seeds: int,
    out: Path,
    json: bool,
) -> None:
    """Write page and table, and print them."""
    import json as jsonlib

    from surgeon.atomic import atomic_file
    from surgeon.cli.compare_page import render
    from surgeon.compare.rows import rows as rows_of

    rows, failed = rows_of(contenders, base, results, seeds)
    missing = {**left_out, **failed}
    if not rows:
        name, why = next(iter(missing.items()))
        raise UsageError("no method ran on this model", f"{name}: {why}", "see the folder's runs, or other --methods")
    result = output.plain(
        {"settings": settings, "base": base, "rows": rows, "not_compared": missing, "page": out / PAGE}
    )
    with atomic_file(out / PAGE) as new:
        new.write_text(render(settings, base, rows, failed, left_out), encoding="utf-8")
    with atomic_file(out / RESULTS) as new:
        new.write_text(jsonlib.dumps(result, indent=2) + "\n", encoding="utf-8")
    output.emit(result, json, table(rows, missing, base))
    if not json:
        output.say(f"wrote {out / PAGE} and {out / RESULTS}")


def table(rows: Sequence[Row], missing: Mapping[str, str], base: Mapping[str, Any]) -> RenderableType:
    """The table for people."""
    from rich.console import Group

    from surgeon.cli.compare_page import cell, spread

    names = ["method", "loss", "fall", "trained", "on disk", "step", "memory", "merged", "4-bit", "ONNX"]
    cells = [
        [
            row.method,
            spread(row.loss),
            cell(row.reduction.mean),
            f"{row.trained:,}",
            output.size(row.checkpoint_bytes),
            f"{1000 * row.seconds_per_step:.0f} ms",
            output.size(row.memory_bytes),
            *(cell(row.after.get(way)) for way in ("merged", "4bit", "onnx")),
        ]
        for row in rows
    ]
    title = f"held-out loss before training {base['loss']:.4f}"
    shown: list[RenderableType] = [output.table(title, names, cells, right=names[1:])]
    if beside := [(row, row.peer) for row in rows if row.peer is not None]:
        shown.append(_beside_peft(beside))
    return Group(*shown, *(f"not compared: {name}: {why}" for name, why in missing.items()))


def _beside_peft(rows: Sequence[tuple[Row, Any]]) -> RenderableType:
    from surgeon.cli.compare_page import cell

    names = ["method", "fall", "PEFT's", "fall / PEFT's", "time / PEFT's", "memory / PEFT's"]
    cells = []
    for row, peer in rows:
        ratios = (peer.reduction_ratio, peer.time_ratio, peer.memory_ratio)
        told = ["–" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        cells.append([row.method, cell(row.reduction.mean), cell(peer.reduction.mean), *told])
    return output.table("beside PEFT: same first values, data, order, steps and rates", names, cells, right=names[1:])


class _Shown:
    """A progress bar over the runs; a line for each where there is no terminal."""

    def __init__(self, methods: int, seeds: int, peers: bool, quiet: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.terminal = output.console().is_terminal
        self.progress = Progress(*columns, console=output.console(), transient=True, disable=not self.terminal)
        self.task = self.progress.add_task("", total=methods * (2 + seeds * (2 if peers else 1)))

    def __enter__(self) -> _Shown:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def begin(self, run: Run) -> None:
        """A run begins."""
        self.progress.update(self.task, description=run.key)

    def done(self, run: Run, result: Result, known: bool) -> None:
        """A run has ended, or its result was known."""
        self.progress.advance(self.task)
        if known or self.terminal:
            return
        if "failed" in result:
            output.say(f"{run.key}: {result['failed']}")
        else:
            told = [f"lr {result['lr']:.3g}"]
            told += [f"loss {result['loss']:.4f}"] if "loss" in result else []
            told += [f"{1000 * result['seconds_per_step']:.0f} ms a step"] if "seconds_per_step" in result else []
            output.say(f"{run.key}: {', '.join(told)}")
