"""`surgeon verify`: do two folders compute the same function, or does an export still compute what it did?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgeon.cli import output
from surgeon.errors import CheckFailed, UsageError


def command(
    first: Annotated[Path, typer.Argument(help="The reference: any folder that surgeon opens; or an ONNX export.")],
    second: Annotated[Path | None, typer.Argument(help="What is checked against it; nothing for an export.")] = None,
    task: Annotated[
        str | None, typer.Option(help="What to capture plain checkpoints for; default: as they say.")
    ] = None,
    json: output.Json = False,
) -> None:
    """Run both on the same probes, in fp32 arithmetic, one weight in memory at a time.

    Prints the largest difference, the bound and where it comes from, and how often both predict the same token. Exits
    with 1 if the difference is over the bound. An ONNX export alone is checked against its own record: its files by
    their sha256, its probes in ONNX Runtime, which is all this needs.

    Examples:
        surgeon verify work/ merged/
        surgeon verify model/ other/ --json
        surgeon verify onnx/
    """
    if second is None:
        exported(first, json)
        return
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


def exported(folder: Path, json: bool) -> None:
    """Replay an ONNX export; nothing here imports torch."""
    from surgeon.lower.onnx.verify import is_export, verify

    if not is_export(folder):
        hint = "name a second folder to compare it with; surgeon run replays an artifact of --target triton"
        raise UsageError("the folder is no ONNX export: it has no surgeon.json", str(folder), hint)
    found = verify(folder)
    result = {"folder": folder, "ok": found.max_error <= found.bound and found.token_agreement == 1, **vars(found)}
    if json:
        output.emit(result, json)
    else:
        said = {
            "files": f"{found.files} as they were written",
            "replayed": f"{found.probes} rows in ONNX Runtime {found.versions['onnxruntime']}: "
            f"{found.token_agreement:.1%} of tokens agree",
            "max |Δlogit|": f"{found.max_error:.3g}, may be {found.bound:.3g}",
            "took": f"{found.seconds:.1f} s",
        }
        output.say(output.fields(said))
    found.require(str(folder))
