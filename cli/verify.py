"""`surgeon verify`: do two folders compute the same function?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import output
from surgeon.errors import CheckFailed


def command(
    first: Annotated[Path, typer.Argument(help="The reference: a work folder, adapter folder or checkpoint.")],
    second: Annotated[Path, typer.Argument(help="What is checked against it.")],
    task: Annotated[
        str | None, typer.Option(help="What to capture plain checkpoints for; default: as they say.")
    ] = None,
    json: output.Json = False,
) -> None:
    """Run both on the same probes, in fp32 arithmetic, one weight in memory at a time.

    Prints the largest difference, the bound and where it comes from, and how often both predict the same token. Exits
    with 1 if the difference is over the bound.

    Examples:
        surgeon verify work/ merged/
        surgeon verify model/ other/ --json
    """
    from surgeon import api

    found = api.verify(first, second, task=task)
    result = {
        "ok": found.ok,
        "max_error": found.max_error,
        "bound": found.bound,
        "because": found.because,
        "token_agreement": found.token_agreement,
        "seconds": found.seconds,
        "peak_rss_bytes": found.peak_rss_bytes,
        "probes": found.probes,
    }
    rows = [(probe.text[:48], f"{probe.max_error:.3g}", f"{probe.token_agreement:.0%}") for probe in found.probes]
    table = output.table("probes", ("probe", "largest difference", "same token"), rows, right=("largest difference",))
    if not json:
        output.say(table)
        output.say(f"largest difference {found.max_error:.3g}, bound {found.bound:.3g} ({found.because})")
    if json:
        output.emit(result, json)
    if not found.ok:
        raise CheckFailed(
            f"not the same function: {found.max_error:.3g} is over the bound {found.bound:.3g}",
            f"{first} and {second}",
            "look at the probes above; surgeon show tells what was applied",
        )
    if not json:
        output.say("the same function")
