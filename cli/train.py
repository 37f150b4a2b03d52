"""`surgeon train`: train what was applied, in place."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import devices, output
from surgeon.errors import UsageError
from surgeon.recipe import PRECISIONS, SCHEDULERS, Recipe, make_recipe

if TYPE_CHECKING:
    from surgeon.data import Row
    from surgeon.train import TrainReport

HELP = {
    "steps": "Optimiser steps.",
    "epochs": "Passes over the data, where --steps is not given (1).",
    "batch_size": "Samples of a batch.",
    "gradient_accumulation": "Batches of a step.",
    "lr": "Highest learning rate, of AdamW (the method's own: surgeon passes NAME).",
    "scheduler": f"Of the learning rate: {', '.join(SCHEDULERS)}.",
    "warmup": "Steps over which it rises from 0, or a share of all below 1.",
    "weight_decay": "AdamW's.",
    "max_grad_norm": "Clip gradients to this norm; 0: not.",
    "max_length": "Cut samples to this many tokens (the model's longest position).",
    "seed": "Of the order of samples and of dropout.",
    "optimizer": "adamw, or paged: AdamW whose state leaves the device when there is no room for it.",
    "precision": f"{' or '.join(PRECISIONS)}; bf16 is autocast.",
    "gradient_checkpointing": "Recompute each layer in the backward pass: less memory, more time.",
    "eval_every": "Steps between evaluations (the last step only).",
    "save_every": "Steps between checkpoints (a tenth of the run).",
}
PANEL = "How to train"
DATA = (
    "JSONL, JSON, CSV or Parquet. Language models: chat, alpaca, completion or text. Classifiers: text (or text_a, "
    "text_b), label. Tags: tokens, labels. Questions: question, context, answers. Choices: question, choices, label. "
    "Pairs: source, target."
)


def with_recipe_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**options` a flag for each field of Recipe; None where a flag is not given."""
    signature = inspect.signature(function, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    hints = typing.get_type_hints(Recipe)
    made = []
    for field in dataclasses.fields(Recipe):
        kind: Any = hints[field.name]
        info = typer.Option("--" + field.name.replace("_", "-"), help=HELP[field.name], rich_help_panel=PANEL)
        made.append(_flag(field.name, field.default, Annotated[kind, info]))

    @functools.wraps(function)
    def inner(**given: Any) -> None:
        function(**given)

    inner.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
    return inner


def _flag(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@with_recipe_flags
def command(
    folder: Annotated[Path, typer.Argument(help="Work folder; with -o also a PEFT adapter folder.")] = Path("work"),
    data: Annotated[Path, typer.Option(help=DATA)] = ...,  # type: ignore[assignment]
    eval_data: Annotated[Path | None, typer.Option(help="Held-out data, evaluated at the end.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Train a copy here, not the work folder.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the newest checkpoint.")] = False,
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the adapter was made.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; default: a GPU if there is one.")] = "",
    json: output.Json = False,
    **options: Any,
) -> None:
    """Train the adapters of a work folder and save them into it, with loss.jsonl, loss.png and checkpoints.

    A killed run leaves the folder as it was, and its checkpoints: --resume then gives the bits of a run never killed.

    Examples:
        surgeon train work/ --data chat.jsonl
        surgeon train work/ --data reviews.csv --eval-data heldout.csv
        surgeon train work/ --data chat.jsonl --eval-data heldout.jsonl --epochs 3 --lr 1e-4
        surgeon train work/ --data chat.jsonl --resume
    """
    from surgeon.data import load_rows

    recipe = make_recipe(options)
    rows, held_out = load_rows(data), None if eval_data is None else load_rows(eval_data)
    target = _target(folder, out, base, resume)
    model = _loaded(target, base, device, recipe, rows)
    from surgeon import store
    from surgeon.manifest import read_manifest
    from surgeon.samples import samples_for
    from surgeon.shown import shown
    from surgeon.train import train

    limit = recipe.max_length
    samples = samples_for(model, model.tokenizer, rows, limit)
    evaluated = None if held_out is None else samples_for(model, model.tokenizer, held_out, limit)
    if recipe.save_every is None:
        recipe = dataclasses.replace(recipe, save_every=math.ceil(recipe.total_steps(len(samples)) / 10))
    output.say(f"data: {samples.summary()}\nthe first sample, what is trained in bold:")
    output.console().print(shown(samples, model.tokenizer))
    report = train(model, model.tokenizer, samples, out=target, eval_data=evaluated, resume=resume, recipe=recipe)
    seed = read_manifest(target).seed
    store.save(model.to("cpu").trained(), target, overwrite=True, seed=seed)
    output.emit({"folder": target, **output.plain(report)}, json, _view(report))
    if not json:
        output.say(_next(target, eval_data))


def _target(folder: Path, out: Path | None, base: Path | None, resume: bool) -> Path:
    """The work folder to train; a copy of `folder` where `out` is given."""
    from surgeon import api, store

    target = out or folder
    if out is not None and not (resume and store.is_work_folder(out)):
        store.save(api.read(folder, base=base), out)
    if not store.is_work_folder(target):
        raise UsageError(f"{target} is no work folder", str(target.absolute()), f"surgeon apply MODEL -o {target}")
    return target


def _loaded(target: Path, base: Path | None, device: str, recipe: Recipe, rows: list[Row]) -> Any:
    """The model: all of it in fp32 for fp32 training; for bf16 the base as it is stored, the adapters in fp32.

    A new head takes the classes of the data.
    """
    import torch

    from surgeon import api, heads, labels, manifest
    from surgeon.model import load_model

    where = devices.chosen(device)
    dtype = torch.float32 if recipe.precision == "fp32" else None
    graph = api.read(target, base=base)
    names = labels.chosen(rows, graph.config, graph.task, open_head=bool(graph.fresh) and not graph.labels)
    if names is not None:
        graph = heads.relabelled(graph, names, manifest.read_manifest(target).seed)
    model = load_model(graph, dtype=dtype, device=where)
    model.tokenizer = api.tokenizer_of(target) or api.tokenizer_of(graph.source)
    if model.tokenizer is None:
        raise UsageError("the base has no tokenizer", str(model.graph.source), "put tokenizer.json beside the config")
    return model


def _view(report: TrainReport) -> Any:
    held_out = {} if report.eval_loss is None else {"held-out loss": f"{report.eval_loss:.4f}"}
    held_out |= {f"held-out {name}": f"{value:.4f}" for name, value in report.eval_metrics.items()}
    resumed = {} if report.resumed_from is None else {"resumed from step": report.resumed_from}
    return output.fields(
        {
            "steps": report.steps,
            **resumed,
            "loss": f"{report.first_loss:.4f} → {report.loss:.4f}",
            **held_out,
            "trained": f"{report.trainable_parameters:,} parameters",
            "speed": f"{report.tokens_per_second:,.0f} tokens/s, {report.seconds:.1f} s",
            "memory": f"{output.size(report.peak_rss_bytes)} peak",
            "curve": report.plot,
        }
    )


def _next(target: Path, eval_data: Path | None) -> str:
    held_out = eval_data or "HELDOUT.jsonl"
    return f"saved {target}; next: surgeon eval {target} --data {held_out}, or surgeon merge {target} -o merged/"
