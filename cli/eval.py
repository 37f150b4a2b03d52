"""`surgeon eval`: loss, perplexity and accuracy on held-out data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import output
from surgeon.errors import UsageError, nearest
from surgeon.recipe import PRECISIONS

if TYPE_CHECKING:
    from surgeon.evaluate import EvalReport


def command(
    folder: Annotated[str, typer.Argument(help="Work folder, PEFT adapter folder, checkpoint or hub id.")] = "work",
    data: Annotated[Path, typer.Option(help="JSONL, JSON, CSV or Parquet, as for training.")] = ...,  # type: ignore[assignment]
    against_base: Annotated[bool, typer.Option(help="Also evaluate the base without its adapters.")] = True,
    batch_size: Annotated[int, typer.Option(help="Samples of a batch.")] = 8,
    max_length: Annotated[int | None, typer.Option(help="Cut samples to this many tokens.")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16; bf16 is autocast.")] = "fp32",
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the adapter was made.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")] = "",
    json: output.Json = False,
) -> None:
    """Measure a model on held-out data, and what its adapters gained over the base.

    Loss is nats per trained token: of chats the assistant's turns, of completions the answers, of plain text all.

    Examples:
        surgeon eval work/ --data heldout.jsonl
        surgeon eval merged/ --data heldout.jsonl --json
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision `{precision}`", "--precision", f"use {nearest(precision, PRECISIONS)}")
    from surgeon.data import load_rows

    rows = load_rows(data)
    import torch

    from surgeon import api
    from surgeon.evaluate import evaluate
    from surgeon.render import render_rows

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if precision == "fp32" else None
    model = api.load(folder, base=base, dtype=dtype, device=where)
    tokenizer, adapted = model.tokenizer, bool(model.graph.applied)
    if tokenizer is None:
        raise UsageError("the base has no tokenizer", str(model.graph.source), "put tokenizer.json beside the config")
    samples = render_rows(rows, tokenizer, max_length or getattr(model.config, "max_position_embeddings", None))
    found = evaluate(model, tokenizer, samples, batch_size=batch_size, precision=precision)
    before = None
    if adapted and against_base:
        plain = api.load(model.graph.source, task=model.graph.task, dtype=dtype, device=where)
        before = evaluate(plain, tokenizer, samples, batch_size=batch_size, precision=precision)
    output.emit(_result(folder, data, found, before), json, _view(folder, found, before))


def _result(folder: str, data: Path, found: EvalReport, before: EvalReport | None) -> dict[str, Any]:
    compared = {} if before is None else {"base": before, "loss_change": found.loss - before.loss}
    return {"folder": folder, "data": data, **output.plain(found), **compared}


def _view(folder: str, found: EvalReport, before: EvalReport | None) -> Any:
    reports = {folder: found} if before is None else {"base": before, folder: found}
    rows = [
        (name, f"{one.loss:.4f}", f"{one.perplexity:,.2f}", f"{one.accuracy:.1%}", f"{one.tokens:,}")
        for name, one in reports.items()
    ]
    columns = ("", "loss", "perplexity", "accuracy", "tokens")
    return output.table("", columns, rows, right=columns[1:])
