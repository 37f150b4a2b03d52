"""`surgeon run`: an artifact of `surgeon export --target triton`, on a GPU or through its reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import output
from surgeon.errors import CheckFailed, UsageError


def command(
    folder: Annotated[Path, typer.Argument(help="Artifact, from surgeon export --target triton.")] = Path("triton"),
    prompt: Annotated[list[str], typer.Option(help="A prompt; repeat for a batch. None replays the probes.")] = [],  # noqa: B006
    ids: Annotated[list[str], typer.Option(help="A prompt as token ids, for example 5,17,3; may repeat.")] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto: a GPU if there is one.")] = "auto",
    json: output.Json = False,
) -> None:
    """Generate with an artifact, greedily; without a prompt replay what the model said when it was exported.

    On a GPU the artifact's binaries run: nothing is compiled, and neither transformers nor Triton is needed. Elsewhere
    the same program runs through the reference of every operator.

    Examples:
        surgeon run triton/
        surgeon run triton/ --prompt "def main(" --tokens 100
        surgeon run triton/ --device cpu --ids 5,17,3 --json
    """
    if tokens <= 0:
        raise UsageError(f"--tokens is {tokens}", "--tokens", "1 or more")
    wanted = [_ids(text) for text in ids]
    from surgeon.artifact.runtime import open_artifact

    artifact = open_artifact(folder, device)
    where = artifact.arch or "reference"
    if not prompt and not wanted:
        found = artifact.replay()
        fields = {"folder": folder, "runs": where, "probes": found.probes, "tokens": found.tokens}
        output.emit(fields | {"token_agreement": found.agreement, "exact": found.exact}, json)
        if not found.ok:
            what = f"the artifact generates other tokens than when it was exported: {found.agreement:.1%} agree"
            raise CheckFailed(what, str(folder), "export it again, with another --precision")
        return
    tokenizer = artifact.tokenizer() if prompt else None
    rows = [tokenizer.encode(text).ids for text in prompt] if tokenizer else []
    made = artifact.generate([*rows, *wanted], tokens, stop=artifact.manifest.stop)
    texts = [tokenizer.decode(row) for row in made[: len(rows)]] if tokenizer else []
    if json:
        output.emit({"folder": folder, "runs": where, "prompts": prompt, "texts": texts, "ids": made}, json)
        return
    for text, more in zip(prompt, texts, strict=True):
        output.write(f"{text}{more}\n")
    for given, more_ids in zip(wanted, made[len(rows) :], strict=True):
        output.write(",".join(map(str, [*given, *more_ids])) + "\n")


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"'{text}' is no list of token ids", "--ids", "numbers with commas, for example 5,17,3"
        ) from error
