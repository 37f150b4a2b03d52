"""`surgeon apply`: put methods into a model, ready to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import output
from surgeon.cli.methods import CONTEXT, LABELS, Methods, chosen, offered

with_methods = offered


def command(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, hub id, or a work folder to stack on.")],
    method: Methods = ["lora"],  # noqa: B006  typer copies it
    out: Annotated[Path, typer.Option("--out", "-o", help="The work folder to write.")] = Path("work"),
    task: Annotated[str, typer.Option(help="What the model is for; read off its config if not given.")] = "",
    labels: Annotated[str, typer.Option(help=LABELS)] = "",
    context: Annotated[int, typer.Option(help=CONTEXT, metavar="TOKENS")] = 0,
    seed: Annotated[int, typer.Option(help="Of the first values of what is inserted, a new head among it.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the work folder if it exists.")] = False,
    json: output.Json = False,
    **options: Any,
) -> None:
    """Rewrite a model's graph with one or more methods and write a work folder. The base is referenced, not copied.

    Examples:
        surgeon apply model/ --method lora --rank 16 --targets all-linear
        surgeon apply model/ --method vera --method 'lora(rank=4, targets=lm_head)' -o work/
        surgeon apply model/ --method longlora --context 32768
        surgeon apply model/ --task sequence-classification --labels neg,pos
    """
    steps = chosen(method, options)
    from surgeon import api, run, store
    from surgeon.cli.plan import view
    from surgeon.labels import parse_labels
    from surgeon.planning import plan

    classes = parse_labels(labels, task) if labels else ()
    graph = api.read(model, task or None, labels=classes, seed=seed, context=context)
    found = plan(graph, *steps)
    applied = run.apply(graph, *steps, seed=seed, tokenizer=api.tokenizer_of(graph.source))
    folder = store.save(applied, out, overwrite=overwrite, seed=seed)
    output.emit({"folder": folder, **output.plain(found)}, json, view(found))
    if not json:
        output.say(f"wrote {folder}; next: surgeon train {folder} --data FILE.jsonl")
