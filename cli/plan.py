"""`surgeon plan`: what a method would cost on a model, before anything is downloaded, loaded or changed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.cli import output
from surgeon.cli.methods import CONTEXT, LABELS, Methods, chosen, offered

if TYPE_CHECKING:
    from rich.console import RenderableType

    from surgeon.flops import TextFlops
    from surgeon.planning import Plan, PlannedSite
    from surgeon.source import Source

_COLUMNS = ("module", "kind", "shape", "method", "rank", "sites", "parameters")
_RIGHT = ("shape", "rank", "sites", "parameters")

with_methods = offered


def command(
    model: Annotated[str, typer.Argument(help="Folder with a config.json, or a hub id.")],
    method: Methods = ["lora"],  # noqa: B006  typer copies it
    task: Annotated[str, typer.Option(help="What the model is for; read off its config if not given.")] = "",
    labels: Annotated[str, typer.Option(help=LABELS)] = "",
    context: Annotated[int, typer.Option(help=CONTEXT, metavar="TOKENS")] = 0,
    json: output.Json = False,
    **options: Any,
) -> None:
    """Count parameters, bytes and FLOPs, and list the sites of a method. Reads config.json alone.

    Examples:
        surgeon plan model/ --method vera --rank 1024 --targets all-linear
        surgeon plan model/ --method lora --method 'vera(rank=64, targets=*.up_proj)' --json
    """
    steps = chosen(method, options)
    from surgeon.planning import plan

    found = plan(_source(model, task, labels, context), *steps, task=task or None)
    output.emit(output.plain(found), json, view(found))


def _source(model: str, task: str, labels: str, context: int) -> Source:
    from surgeon.labels import parse_labels
    from surgeon.source import open_source

    classes = parse_labels(labels, task) if labels else ()
    return open_source(model, task or None, weights=False, labels=classes, context=context)


def view(plan: Plan) -> RenderableType:
    """A plan for people: the sites, alike ones in one line, and the totals."""
    from rich.console import Group

    rows = [
        (pattern, sites[0].kind, shape(sites[0]), sites[0].method, sites[0].rank or "", len(sites), f"{count:,}")
        for pattern, sites in alike(plan.sites)
        for count in [sum(site.trainable_parameters for site in sites)]
    ]
    shown: list[RenderableType] = [output.table("", _COLUMNS, rows, right=_RIGHT), output.fields(totals(plan))]
    shown += dict.fromkeys(f"skipped {_any_layer(skip.path)}: {skip.why}" for skip in plan.skipped)
    return Group(*shown)


def alike(sites: tuple[PlannedSite, ...]) -> list[tuple[str, list[PlannedSite]]]:
    """Sites that differ in their layer alone, as one pattern with a `*` for the layer's number."""
    found: dict[tuple[object, ...], list[PlannedSite]] = {}
    for site in sites:
        pattern = _any_layer(site.path)
        found.setdefault((pattern, site.shape, site.method, site.rank), []).append(site)
    return [(str(key[0]) if len(group) > 1 else group[0].path, group) for key, group in found.items()]


def _any_layer(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def shape(site: PlannedSite) -> str:
    """`out × in`."""
    return f"{site.shape[0]:,} × {site.shape[1]:,}"


def totals(plan: Plan) -> dict[str, str]:
    """The numbers below the table."""
    share = 100 * plan.trainable_parameters / max(plan.base_parameters, 1)
    stored = f"{output.size(plan.bytes.adapter)} · {plan.stored_parameters:,} numbers in fp32"
    flops, trained = plan.flops_per_token, sum(site.trainable_parameters > 0 for site in plan.sites)
    added = 100 * flops.adapter / max(flops.base, 1)
    size = output.size(plan.bytes.base)
    size += f", quantised {output.size(plan.bytes.quantised)}" if plan.bytes.quantised != plan.bytes.base else ""
    size += f", in memory {output.size(plan.bytes.memory)}" if plan.bytes.memory != plan.bytes.base else ""
    return {
        "model": f"{plan.model}, {plan.task} · {plan.base_parameters:,} parameters · {size}",
        "trains": f"{plan.trainable_parameters:,} parameters ({share:.3g} %) at {trained} sites",
        "stored": f"{stored}, {plan.frozen_parameters:,} of them frozen" if plan.frozen_parameters else stored,
        "training": f"{output.size(plan.bytes.training)} for weights, gradients and AdamW; activations come on top",
        "per token": f"forward {_flops(flops.forward)} (+{added:.2g} %) · training step {_flops(flops.training_step)}",
        **({} if plan.flops_per_text is None else {"per text": _text(plan.flops_per_text)}),
    }


def _text(flops: TextFlops) -> str:
    share = 100 * flops.attention / flops.total
    return f"of {flops.length:,} tokens: forward {_flops(flops.total)}, {share:.3g} % of it attention scores and values"


def _flops(count: int) -> str:
    return output.size(count).removesuffix("B").rstrip() + "FLOP"
