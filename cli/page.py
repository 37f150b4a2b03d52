"""The self-contained web page of a work folder: no scripts, no fonts, nothing loaded from anywhere."""

from __future__ import annotations

from importlib import resources
from typing import Any

from surgeon import drawing, text
from surgeon.chains import span
from surgeon.cli import output
from surgeon.cli.show import brief, tokens
from surgeon.graph import Graph, tag
from surgeon.rank_map import grid
from surgeon.report import AdaptedSite, Report, base_graph


def render(graph: Graph, report: Report) -> str:
    """The page of an adapted graph and its report, as HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = resources.files("surgeon.cli").joinpath("data/show.html.j2").read_text(encoding="utf-8")
    base, (path, layers) = base_graph(graph), drawn_layer(graph)
    largest = max((site.change for site in report.sites), default=0.0)
    stored = {name: count for name, count in report.files.items() if not name.startswith("checkpoint-")}
    weights = sum(count for name, count in stored.items() if name.endswith(".safetensors"))
    return environment.from_string(source).render(
        report=report,
        methods=" + ".join(spec.partition("(")[0] for spec in report.methods),
        specs=[brief(spec) for spec in report.methods],
        share=f"{100 * report.trainable_parameters / max(report.base_parameters, 1):.3g} %",
        adapter_bytes=weights,
        layers=layers,
        before=drawing.draw(base.layers[path] if path else base.trunk, "the layer before"),
        after=drawing.draw(graph.layers[path] if path else graph.trunk, "the layer after"),
        map=heat_map(report.sites),
        virtual=[tokens(site) for site in report.virtual],
        largest=largest,
        ranks=sorted({site.rank for site in report.sites}),
        portion=lambda value: f"{value / largest:.4f}" if largest else "0",
        change=lambda value: f"{value:.2e}" if 0 < value < 1e-3 else f"{value:.3g}",
        size=output.size,
        diff=[(kind(line), line) for line in text.diff(base, graph, 2).splitlines()[2:]],
    )


def drawn_layer(graph: Graph) -> tuple[str, str]:
    """The first layer with inserted nodes ("" for the trunk), and a sentence that says which layers it stands for."""
    for part, paths in graph.groups():
        if any(tag(node) for node in part.nodes):
            return paths[0], f"{span(paths)}, which {'are all alike' if len(paths) > 1 else 'is adapted alone'}."
    return "", "The trunk of the model, around its layers."


def kind(line: str) -> str:
    """What a line of a diff is: "plus", "minus", "hunk" or "same"."""
    return {"+": "plus", "-": "minus", "@": "hunk"}.get(line[:1], "same")


def heat_map(sites: tuple[AdaptedSite, ...]) -> dict[str, Any]:
    """The adapted modules of a model's layers: one row per module of a layer, one column per layer."""
    by_path = {site.path: site for site in sites}
    layers, rows = grid(by_path)
    return {"columns": layers, "rows": [(name, [by_path.get(path) for path in paths]) for name, paths in rows]}
