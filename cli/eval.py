"""`surgeon eval`: loss, perplexity and accuracy on held-out data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import devices, output
from surgeon.errors import UsageError, nearest
from surgeon.recipe import PRECISIONS

if TYPE_CHECKING:
    from surgeon.evaluate import EvalReport
    from surgeon.evaluate_tasks import TaskReport
    from surgeon.graph import Graph

    Report = EvalReport | TaskReport


def command(
    folder: Annotated[str, typer.Argument(help="Work folder, PEFT adapter folder, checkpoint or hub id.")] = "work",
    data: Annotated[Path, typer.Option(help="JSONL, JSON, CSV or Parquet, as for training.")] = ...,  # type: ignore[assignment]
    against_base: Annotated[bool, typer.Option(help="Also evaluate the base without its adapters.")] = True,
    batch_size: Annotated[int, typer.Option(help="Samples of a batch.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Cut samples to this many tokens.")] = None,
    ranks: Annotated[str, typer.Option(help="Of an adapter that has every rank (dylora): all, or 1,2,8.")] = "",
    generate: Annotated[bool, typer.Option(help="Also compare what a seq2seq model writes with the targets.")] = False,
    precision: Annotated[str, typer.Option(help="fp32 or bf16; bf16 is autocast.")] = "fp32",
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the adapter was made.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")] = "",
    json: output.Json = False,
) -> None:
    """Measure a model on held-out data, and what its adapters gained over the base.

    Loss is nats per trained token: of chats the assistant's turns, of completions the answers, of plain text all.
    Classifiers get accuracy and F1, taggers the F1 of entities, questions exact match and F1 as SQuAD has them,
    regressions errors and correlations.

    Examples:
        surgeon eval work/ --data heldout.jsonl
        surgeon eval merged/ --data heldout.jsonl --json
        surgeon eval work/ --data heldout.jsonl --ranks all
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision `{precision}`", "--precision", f"use {nearest(precision, PRECISIONS)}")
    from surgeon.data import load_rows

    rows = load_rows(data)
    import torch

    from surgeon import api
    from surgeon.evaluate import evaluate
    from surgeon.samples import samples_for

    where = devices.chosen(device)
    dtype = torch.float32 if precision == "fp32" else None
    model = api.load(folder, base=base, dtype=dtype, device=where)
    tokenizer, adapted = model.tokenizer, bool(model.graph.applied)
    if tokenizer is None:
        raise UsageError("the base has no tokenizer", str(model.graph.source), "put tokenizer.json beside the config")
    samples = samples_for(model, tokenizer, rows, max_length)
    found = evaluate(model, tokenizer, samples, batch_size=batch_size, precision=precision, generate=generate)
    by_rank: dict[int, Report] = {}
    if ranks:
        by_rank = _by_rank(model, samples, ranks, Path(folder), batch_size=batch_size, precision=precision)
    plain = _plain(model.graph, dtype, where) if adapted and against_base else None
    before = None
    if plain is not None:
        before = evaluate(plain, tokenizer, samples, batch_size=batch_size, precision=precision, generate=generate)
    result = _result(folder, data, found, before) | ({"ranks": by_rank} if by_rank else {})
    output.emit(result, json, _view(folder, found, before, by_rank))


def _by_rank(model: Any, samples: Any, ranks: str, folder: Path, **options: Any) -> dict[int, Report]:
    """The report at each rank, and their losses drawn into the folder."""
    from surgeon.evaluate_ranks import evaluate_ranks, plot_ranks

    chosen = None if ranks == "all" else _numbers(ranks)
    found: dict[int, Report] = dict(evaluate_ranks(model, model.tokenizer, samples, chosen, **options))
    plot_ranks({rank: report.loss for rank, report in found.items()}, folder / "loss_by_rank.png")
    return found


def _plain(graph: Graph, dtype: Any, where: str) -> Any:
    """The base without its adapters; None for a new head, which has learned nothing without them."""
    from surgeon import api
    from surgeon.model import load_model

    if graph.fresh:
        return None
    return load_model(api.read(graph.source, graph.task, labels=graph.labels), dtype=dtype, device=where)


def _result(folder: str, data: Path, found: Report, before: Report | None) -> dict[str, Any]:
    compared = {} if before is None else {"base": _flat(before), "loss_change": found.loss - before.loss}
    return {"folder": folder, "data": data, **_flat(found), **compared}


def _flat(report: Report) -> dict[str, Any]:
    """The fields of a report, with those of its metrics beside them."""
    plain: dict[str, Any] = output.plain(report)
    measured = plain.pop("metrics", {})
    return {**plain, **measured}


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"cannot read the ranks '{text}'", "--ranks", "all, or numbers: 1,2,8") from error


def _view(folder: str, found: Report, before: Report | None, by_rank: Mapping[int, Report]) -> Any:
    reports = {folder: found} if before is None else {"base": before, folder: found}
    reports |= {f"rank {rank}": report for rank, report in by_rank.items()}
    names = list(_flat(found))
    rows = [(name, *(_shown(key, _flat(one)[key]) for key in names)) for name, one in reports.items()]
    return output.table("", ("", *names), rows, right=names)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    shares = ("accuracy", "f1", "f1_macro", "precision", "recall", "exact_match")
    return f"{value:.1%}" if name in shares else f"{value:,.2f}" if name == "perplexity" else f"{value:.4f}"
