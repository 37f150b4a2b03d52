"""`surgeon passes`: the methods there are, and what each of them does and takes."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from surgeon.cli import output
from surgeon.errors import UsageError, nearest
from surgeon.options import equation, methods, options_of, summary
from surgeon.passes import find
from surgeon.passes.base import Pass
from surgeon.presets import PRESETS, Preset


def command(
    name: Annotated[str, typer.Argument(help="A method, to see its options and what it inserts.")] = "",
    json: output.Json = False,
) -> None:
    """List the methods, or explain one: its equation, what it inserts, and its options.

    Examples:
        surgeon passes
        surgeon passes vera
    """
    known = methods()
    if not name:
        rows = [(found, equation(method)) for found, method in known.items()]
        rows += [(found, f"{' + '.join(spelled(preset))}: {preset.summary}") for found, preset in PRESETS.items()]
        facts = {found: _facts(method) for found, method in known.items()}
        presets = {found: {"summary": preset.summary, "passes": spelled(preset)} for found, preset in PRESETS.items()}
        output.emit({"passes": facts, "presets": presets}, json, _list(rows))
        return
    name = name.replace("-", "_")
    if name in PRESETS:
        preset = PRESETS[name]
        output.emit({"name": name, "summary": preset.summary, "passes": spelled(preset)}, json)
        return
    if name not in known:
        raise UsageError(f"unknown method '{name}'", "surgeon passes", f"nearest: {nearest(name, [*known, *PRESETS])}")
    output.emit({"name": name, **_facts(known[name])}, json, _page(known[name]))


def spelled(preset: Preset) -> list[str]:
    """The passes of a preset as they would be written on the command line."""
    return [find(step).make(options).spec() for step, options in preset.steps]


def _list(rows: list[tuple[str, str]]) -> Any:
    return output.table("", ("method", "what it computes"), rows)


def _facts(method: type[Pass]) -> dict[str, Any]:
    return {
        "summary": summary(method),
        "equation": equation(method),
        "keeps": method.keeps,
        "stacks": method.stacks,
        "sites": method.kinds,
        "inserts": inserts(method),
        "learning_rate": method.learning_rate,
        "options": options_of(method),
    }


def _page(method: type[Pass]) -> Any:
    from rich.console import Group

    text = inspect.cleandoc(method.__doc__ or "").partition("\n\nOptions:\n")[0]
    rows = [(option.flag, option.type, repr(option.default), option.help) for option in options_of(method)]
    facts = {
        "inserts": inserts(method) or "nothing beside the base's own nodes",
        "at": ", ".join(method.kinds) or "the whole graph",
        "keeps": KEEPS[method.keeps],
        "stacks": "may be applied again" if method.stacks else "once",
        "learning rate": f"{method.learning_rate:g} unless surgeon train is told another",
    }
    table = output.table("", ("option", "type", "default", "what it does"), rows)
    return Group(equation(method), "", text, "", output.fields(facts), table)


KEEPS = {
    "exact": "the model computes the same bits until it is trained",
    "close": "the model computes the same up to rounding until it is trained",
    "changes": "the model computes something else at once",
}


def inserts(method: type[Pass]) -> str:
    """The first line of the method's `rewrite`: the nodes at one site."""
    return inspect.cleandoc(method.rewrite.__doc__ or "").splitlines()[0] if method.rewrite is not Pass.rewrite else ""
