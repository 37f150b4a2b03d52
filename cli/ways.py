"""Merging over a quantised base on the command line: a table of what every way would lose, then one of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.cli import output
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from surgeon.graph import Graph
    from surgeon.lower.into import Into
    from surgeon.lower.ways import WayError

FLOAT_WAYS = ("dequant", "original")


def over_codes(
    graph: Graph, out: Path, into: str, accept_error: bool, json: bool, options: dict[str, Any], again: dict[str, Any]
) -> None:
    """Tell what each way of merging would lose, and merge `into` one of them.

    Args:
        graph: what is to be merged.
        out: the new folder.
        into: the way.
        accept_error: whatever it loses.
        json: print one object.
        options: of the ways that write floating-point weights.
        again: form and calibration, of the ways that write codes.

    Raises:
        UsageError: an option does not go with the way.
    """
    from surgeon import api

    if into not in FLOAT_WAYS:
        if options["dtype"] is not None:
            raise UsageError(f"--into {into} writes codes, which have no dtype", "--dtype", "leave it out")
        options = {"overwrite": options["overwrite"], **again}
    elif again["form"]:
        raise UsageError(f"--into {into} writes no codes", "--format", "--into requant or zero-points, or leave it out")
    if again["calibration"] and into != "requant":
        raise UsageError(f"--into {into} chooses no codes", "--calibration", "--into requant, or leave it out")

    def tell(found: tuple[WayError, ...]) -> None:
        if not json:
            output.say(table(found, into))

    done = api.merge_into(graph, out, into=into, accept_error=accept_error, tell=tell, **options)
    found = summary(done)
    short = {name: value for name, value in found.items() if name not in ("errors", "quantised")}
    in_codes = len(done.quantised.quantised) if done.quantised is not None else 0
    output.emit(found, json, output.fields({**short, "weights in codes": in_codes}))
    if not json:
        output.say(f"next: surgeon verify WORK {out}, or surgeon generate {out}")


def table(found: tuple[WayError, ...], chosen: str) -> Any:
    """One row per way: its error end to end, the worst weight, or why it cannot be done."""
    rows = []
    for item in found:
        mark = "→ " if item.way == chosen else "  "
        if item.why:
            rows.append((mark + item.way, "", "", "", f"cannot be done: {item.why}"))
            continue
        weights = list((item.weights or {}).values())
        mean, (name, worst) = sum(weights) / max(1, len(weights)), item.worst
        rows.append(
            (mark + item.way, f"{item.error:.2e}", f"{item.token_agreement:.1%}", f"{mean:.2e}", f"{worst:.2e} {name}")
        )
    title = "relative error against the adapted model"
    return output.table(title, ("into", "outputs", "same tokens", "weights, mean", "weights, worst"), rows)


def summary(done: Into) -> dict[str, Any]:
    """What `--json` prints: every way's errors, per weight too, and what was written."""
    from surgeon.cli import merge

    errors = {
        item.way: {"why": item.why} if item.why else {
            "outputs": item.error, "token_agreement": item.token_agreement, "weights": dict(item.weights or {}),
        }
        for item in done.errors
    }  # fmt: skip
    if done.merged is not None:
        return {"into": done.way, "errors": errors, **merge.summary(done.merged)}
    assert done.quantised is not None
    written = done.quantised
    return {
        "into": done.way,
        "errors": errors,
        "folder": written.folder,
        "quantised": written.quantised,
        "form": written.form,
        "bytes": written.nbytes,
        "max_error": done.comparison.max_error if done.comparison is not None else None,
    }
