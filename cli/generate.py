"""`surgeon generate`: continue prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.cli import output
from surgeon.errors import UsageError


def command(
    folder: Annotated[str, typer.Argument(help="Work folder, PEFT adapter folder, checkpoint or hub id.")] = "work",
    prompt: Annotated[list[str], typer.Option(help="A prompt; repeat for a batch. `-` reads standard input.")] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="Above 0 samples; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this much probability.")] = 1.0,
    beams: Annotated[int, typer.Option(help="Beams of a beam search.")] = 1,
    stop: Annotated[list[str], typer.Option(help="Stop after this text; may repeat.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the adapter was made.")] = None,
    json: output.Json = False,
) -> None:
    """Continue prompts with a model and print prompt and continuation; of an encoder-decoder, what it writes.

    Examples:
        surgeon generate work/ --prompt "def main("
        surgeon generate model/ --prompt "Once" --temperature 0.8 --top-p 0.95 --tokens 100
    """
    prompts = [sys.stdin.read() if text == "-" else text for text in prompt]
    if not prompts:
        raise UsageError("no prompt", "surgeon generate", 'give --prompt "…", or --prompt - to read standard input')
    options = sampling(tokens, temperature, top_p, beams, stop)
    import torch

    from surgeon import api
    from surgeon.chat import complete

    model = api.load(folder, base=base)
    torch.manual_seed(seed)
    texts = complete(model, model.tokenizer, prompts, **options)
    if json:
        output.emit({"folder": folder, "prompts": prompts, "texts": texts}, json)
        return
    for text, more in zip(prompts, texts, strict=True):
        output.write(f"{'' if model.graph.task == 'seq2seq-lm' else text}{more}\n")


def sampling(
    tokens: int, temperature: float, top_p: float = 1.0, beams: int = 1, stop: list[str] | None = None
) -> dict[str, Any]:
    """The options of `generate` for those of the command line.

    Raises:
        UsageError: a number is out of range.
    """
    for name, value, fits, hint in (
        ("--tokens", tokens, tokens > 0, "1 or more"),
        ("--temperature", temperature, temperature >= 0, "0 or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ("--beams", beams, beams > 0, "1 or more"),
    ):
        if not fits:
            raise UsageError(f"{name} is {value}", name, hint)
    options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": temperature > 0, "num_beams": beams}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    return options | ({"stop_strings": stop} if stop else {})
