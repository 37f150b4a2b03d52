"""`surgeon show`: what is in a work folder, and what it did to the model."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.cli import output
from surgeon.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from surgeon.report import Report
    from surgeon.report_virtual import VirtualSite

_COLUMNS = ("module", "method", "out × in", "rank", "parameters", "‖ΔW‖ / ‖W‖")
_LONG = 160
_VIRTUAL = ("module", "method", "tokens × size", "numbers", "mean length")


def command(
    folder: Annotated[Path, typer.Argument(help="Work folder or PEFT adapter folder.")] = Path("work"),
    diff: Annotated[bool, typer.Option("--diff", help="Print what the methods changed in the graph.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page to this file.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base, if it moved since the folder was made.")] = None,
    json: output.Json = False,
) -> None:
    """Show the adapted modules: rank, parameters, how far each weight moved, virtual tokens, and sizes on disk.

    Examples:
        surgeon show work/
        surgeon show work/ --diff
        surgeon show work/ --html work.html
    """
    if html is not None and not html.absolute().parent.is_dir():
        raise UsageError(f"no folder {html.parent}", f"--html {html}", "make the folder, or name another file")
    from surgeon import api, text
    from surgeon.report import base_graph, report

    graph = api.read(folder, base=base)
    if not graph.applied:
        raise UsageError("no method is applied", str(folder), "surgeon apply --method lora makes a work folder")
    with output.bar("reading weights") as advance:
        found = report(graph, folder, advance)
    changes = text.diff(base_graph(graph), graph) if diff or json else ""
    result = {**output.plain(found), **({"diff": changes} if json else {})}
    if html is not None:
        from surgeon.atomic import atomic_file
        from surgeon.cli.page import render

        with atomic_file(html) as new:
            new.write_text(render(graph, found), encoding="utf-8")
        result["html"] = html
    if diff and not json:
        output.write(coloured(changes))
    else:
        output.emit(result, json, view(found))
    if html is not None and not json:
        output.say(f"wrote {html}")


def view(report: Report) -> RenderableType:
    """The report for people: a line per site, and the totals."""
    from rich.console import Group

    rows = [
        (
            site.path,
            " + ".join(site.methods),
            f"{site.shape[0]:,} × {site.shape[1]:,}",
            site.rank or "",
            f"{site.parameters:,}",
            f"{site.change:.3g}",
        )
        for site in report.sites
    ]
    share = 100 * report.trainable_parameters / max(report.base_parameters, 1)
    totals = {
        "folder": f"{report.folder} · {output.size(sum(report.files.values()))}",
        "base": f"{report.base} · {report.model} · {output.size(report.base_bytes)}",
        "methods": " + ".join(map(brief, report.methods)),
        "trains": f"{report.trainable_parameters:,} parameters ({share:.3g} %) at {report.site_count} sites",
    }
    tables = [output.table("", _COLUMNS, rows, right=_COLUMNS[2:])] if rows else []
    if report.virtual:
        tables.append(output.table("", _VIRTUAL, map(tokens, report.virtual), right=_VIRTUAL[2:]))
    return Group(*tables, output.fields(totals))


def brief(spec: str) -> str:
    """An option string without the pairs of long options, whose values the table has: `ranks=…`."""
    return spec if len(spec) <= _LONG else re.sub(r"=\(\(.*?\)\)", "=…", spec)


def tokens(site: VirtualSite) -> tuple[str, str, str, str, str]:
    """The cells of a site with virtual tokens."""
    words = "‖row‖ {:.3g}, vocabulary {:.3g}" if site.kind == "embedding" else "‖k‖ {:.3g}, ‖v‖ {:.3g}"
    size = " × ".join(f"{count:,}" for count in (site.tokens, *site.shape))
    return site.path, site.method, size, f"{site.numbers:,}", words.format(site.norm, site.beside)


def coloured(changes: str) -> str:
    """A diff with added lines in green and removed ones in red, where a terminal shows it; plain into a pipe."""
    out = sys.__stdout__
    if out is None or not out.isatty() or "NO_COLOR" in os.environ:
        return changes + "\n"
    codes = {"+": "32", "-": "31", "@": "36"}
    return "".join(
        f"\033[{codes[line[0]]}m{line}\033[0m\n" if line[:1] in codes else f"{line}\n" for line in changes.splitlines()
    )
