"""Methods and their options on a command line: `--method NAME` and a flag for every option of every adapter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Optional

import typer

from surgeon.errors import UsageError, nearest
from surgeon.options import Option, methods, options_of, parse_spec
from surgeon.passes.base import Pass
from surgeon.presets import passes_of

Methods = Annotated[
    list[str],
    typer.Option(
        "--method",
        "-m",
        help="A method or 'method(option=value, …)'; may repeat, applied in order. `surgeon passes` lists them.",
    ),
]
"""The type of a command's `method` option."""

LABELS = "Classes of a new head: neg,pos, how many (1: a regression), or a data file. Default: the training data's."
"""The help of the option for the classes of a classifier."""
CONTEXT = "Length to scale the positions of the base to, for example 32768; its own if not given."
"""The help of the option for a longer context."""
PANEL = "Options of the methods (each holds for every --method that has it)"


def offered() -> dict[str, type[Pass]]:
    """The methods that users apply by name."""
    return {name: method for name, method in methods().items() if method.offered}


def with_method_options(command: Callable[..., None], methods: Mapping[str, type[Pass]]) -> Callable[..., None]:
    """Give a command that takes `**options` a flag for each option of each method; a flag not given is left out.

    Args:
        command: it.
        methods: them, by name.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    made = [_parameter(name, found, len(methods)) for name, found in _by_name(methods).items()]

    @functools.wraps(command)
    def inner(**given: Any) -> None:
        names = {parameter.name for parameter in own}
        command(**{name: value for name, value in given.items() if name in names or value is not None})

    inner.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
    return inner


def chosen(specs: list[str], flags: Mapping[str, Any]) -> list[Pass]:
    """The passes of a command line: a method's own parentheses come before the flags, and those before a preset.

    Raises:
        UsageError: a method or option is unknown, or no chosen method has an option that was given.
    """
    known, parsed = (
        offered(),
        [
            (name, fixed, values)
            for method, values in map(parse_spec, specs)
            for name, fixed in passes_of(method).items()
        ],
    )
    for name, _, _ in parsed:
        if name not in known:
            raise UsageError(f"{name} is not applied by its name", "--method", f"nearest: {nearest(name, known)}")
    options = {name: {option.name: option for option in options_of(known[name])} for name, _, _ in parsed}
    for flag in flags:
        if not any(flag in own for own in options.values()):
            every = [option.flag for own in options.values() for option in own.values()]
            names = " and ".join(dict.fromkeys(name for name, _, _ in parsed))
            raise UsageError(
                f"{names}: no option --{flag.replace('_', '-')}", "--method", f"nearest: {_near(flag, every)}"
            )
    return [
        known[name].make({**fixed, **_values(options[name], flags), **_own(values, options[name])})
        for name, fixed, values in parsed
    ]


def _own(values: Mapping[str, Any], options: Mapping[str, Option]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in options}


def _near(flag: str, every: list[str]) -> str:
    return nearest(f"--{flag.replace('_', '-')}", every)


def _values(options: Mapping[str, Option], flags: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, bool) else options[name].parse(value)
        for name, value in flags.items()
        if name in options
    }


def _by_name(methods: Mapping[str, type[Pass]]) -> dict[str, dict[str, Option]]:
    """Option name → the methods that have it."""
    found: dict[str, dict[str, Option]] = {}
    for name, method in methods.items():
        for option in options_of(method):
            found.setdefault(option.name, {})[name] = option
    return found


def _parameter(name: str, found: Mapping[str, Option], methods: int) -> inspect.Parameter:
    first = next(iter(found.values()))
    flag = f"{first.flag}/--no-{first.flag[2:]}" if first.type == "bool" else first.flag
    kind: Any = Optional[bool] if first.type == "bool" else Optional[str]  # noqa: UP045  typer 0.20 reads this form
    metavar = {"pairs": "PATTERN=VALUE,…", "int": "N", "float": "X", "text": "TEXT"}.get(first.type)
    info = typer.Option(flag, help=_help(found, methods), metavar=metavar, rich_help_panel=PANEL, show_default=False)
    annotation = Annotated[kind, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(found: Mapping[str, Option], methods: int) -> str:
    """The help, and the defaults: one if the methods agree, else by method; who has the option if not all do."""
    helps = dict.fromkeys(option.help for option in found.values())
    defaults = {name: _shown(option.default) for name, option in found.items()}
    everywhere, same = len(found) == methods, len(set(defaults.values())) == 1
    if same and everywhere:
        note = next(iter(defaults.values()))
    else:
        note = ", ".join(f"{name}: {value}" if value else name for name, value in defaults.items())
    text = " / ".join(helps).replace("[", r"\[").replace("`", "")
    return f"{text} ({note})" if note else text


def _shown(default: Any) -> str:
    return "" if default in ("", ()) else str(default)
