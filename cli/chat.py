"""`surgeon chat`: talk to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import output
from surgeon.cli.generate import sampling


def command(
    folder: Annotated[str, typer.Argument(help="Work folder, PEFT adapter folder, checkpoint or hub id.")] = "work",
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    tokens: Annotated[int, typer.Option(help="At most this many tokens per answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Above 0 samples; 0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this much probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the adapter was made.")] = None,
) -> None:
    """Talk to a model in its own chat template. `/reset` starts anew, `/exit` ends; Ctrl-C stops an answer.

    Examples:
        surgeon chat work/
        surgeon chat model/ --system "You answer in one sentence."
    """
    options = sampling(tokens, temperature, top_p)
    import torch

    from surgeon import api
    from surgeon.chat import Chat, chat_turns

    model = api.load(folder, base=base)
    chat = Chat(model, model.tokenizer, system=system, **options)
    torch.manual_seed(seed)
    output.say("/reset starts anew, /exit ends")
    chat_turns(chat, lambda: input("> "), output.write)
