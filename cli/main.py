"""The `surgeon` command: a table of commands, and one way to fail."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from inspect import cleandoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from surgeon.cli import output
from surgeon.cli.methods import with_method_options
from surgeon.errors import SurgeonError, UsageError, nearest
from surgeon.remote_code import FLAG, trust_remote_code

# Command name -> module with a function `command`, in the order `--help` lists them. A module is imported when its
# command runs, and all of them for the texts of `--help`: none may import torch or transformers at module level.
COMMANDS: dict[str, str] = {
    "demo": "surgeon.cli.demo",
    "plan": "surgeon.cli.plan",
    "apply": "surgeon.cli.apply",
    "train": "surgeon.cli.train",
    "eval": "surgeon.cli.eval",
    "compare": "surgeon.cli.compare",
    "generate": "surgeon.cli.generate",
    "chat": "surgeon.cli.chat",
    "quantise": "surgeon.cli.quantise",
    "merge": "surgeon.cli.merge",
    "export": "surgeon.cli.export",
    "prepack": "surgeon.cli.prepack",
    "adapter": "surgeon.cli.adapter",
    "run": "surgeon.cli.run",
    "serve": "surgeon.cli.serve",
    "convert": "surgeon.cli.convert",
    "verify": "surgeon.cli.verify",
    "show": "surgeon.cli.show",
    "passes": "surgeon.cli.passes",
    "doctor": "surgeon.cli.doctor",
}

# Commands that open models, whose checkpoints may bring code of their own.
OPENING = (
    "plan",
    "apply",
    "train",
    "eval",
    "generate",
    "chat",
    "quantise",
    "merge",
    "export",
    "adapter",
    "serve",
    "convert",
    "verify",
    "show",
)
TRUST = typer.Option(FLAG, help="Run the Python code that the checkpoint brings along.", show_default=False)

INTERRUPTED = 130  # 128 + SIGINT, what shells report


class CommandTable(TyperGroup):
    """The commands of `COMMANDS`: what lists them gets their texts, what runs one its parser."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The name and text of a command, or None."""
        if cmd_name not in COMMANDS:
            return None
        text, _ = split_examples(importlib.import_module(COMMANDS[cmd_name]).command.__doc__ or "")
        return TyperCommand(cmd_name, help=text, rich_markup_mode="rich")

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command with its parser; an unknown name is an error that suggests the nearest ones."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise UsageError(f"no command named {args[0]!r}", ctx.command_path, _did_you_mean(args[0], COMMANDS))
        name, found, rest = super().resolve_command(ctx, args)
        return name, load(name) if name in COMMANDS else found, rest


def load(name: str) -> Any:
    """Import one command and build its parser.

    The module exposes `command`. It may expose `with_methods`, a function that gives the methods whose options the
    command takes too, and `context_settings` (a dict, as click takes it) when it reads options of its own. The part of
    the docstring from `Examples:` on is shown below the options.
    """
    module = importlib.import_module(COMMANDS[name])
    text, examples = split_examples(module.command.__doc__ or "")
    function = module.command
    if hasattr(module, "with_methods"):
        function = with_method_options(function, module.with_methods())
    function = _trusting(function) if name in OPENING else function
    single = typer.Typer(add_completion=False, rich_markup_mode="rich")
    settings = {"help_option_names": ["-h", "--help"], **getattr(module, "context_settings", {})}
    single.command(name, help=text, epilog=examples, context_settings=settings)(_reserving_stdout(function))
    return typer.main.get_command(single)


def _trusting(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with a flag that lets checkpoints' own code run."""
    signature = inspect.signature(command, eval_str=True)
    annotation = Annotated[bool, TRUST]
    flag = inspect.Parameter("trusted", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)

    @functools.wraps(command)
    def inner(*args: Any, trusted: bool, **options: Any) -> Any:
        with trust_remote_code(trusted):
            return command(*args, **options)

    inner.__signature__ = signature.replace(parameters=[*signature.parameters.values(), flag])  # type: ignore[attr-defined]
    return inner


def _reserving_stdout(command: Callable[..., Any]) -> Callable[..., Any]:
    # Around the function only: help pages and completion scripts are printed before it is called.
    @functools.wraps(command)
    def inner(*args: Any, **options: Any) -> Any:
        with output.reserved_stdout():
            return command(*args, **options)

    return inner


def split_examples(docstring: str) -> tuple[str, str | None]:
    """A docstring's text, and its examples in the form that the help page shows line by line."""
    text, found, examples = cleandoc(docstring).replace("[", r"\[").partition("Examples:\n")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    return text.strip(), "\n".join(["\b", "[bold]Examples[/bold]", *lines]) if found else None


def version() -> str:
    """The installed version; `unknown` in a clone that was never installed."""
    from importlib import metadata  # 50 ms that --help does not need

    try:
        return metadata.version("model-surgeon")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _show_version(wanted: bool) -> None:
    if wanted:
        output.write(f"surgeon {version()}\n")
        raise typer.Exit


app = typer.Typer(
    name="surgeon",
    cls=CommandTable,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def surgeon(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Adapt and deploy transformer models: capture once, rewrite, train, merge, export, verify."""


def main(args: Sequence[str]) -> int:
    """Run one command line and return its exit code: 0 done, 1 a check failed, 2 bad usage, 3 not supported."""
    try:
        result = typer.main.get_command(app).main(list(args) or ["--help"], prog_name="surgeon", standalone_mode=False)
    except SurgeonError as error:
        return _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("SURGEON_DEBUG"):
            raise
        return _fail(_expected(error) or _unexpected(error))
    return result if type(result) is int else 0


def _expected(error: Exception) -> SurgeonError | None:
    """The parser's own complaint (an unknown option, a missing argument, a bad value) as a usage error."""
    message = getattr(error, "format_message", None)
    if not callable(message):
        return None
    ctx = getattr(error, "ctx", None)
    command = ctx.command_path if ctx else "surgeon"
    option = getattr(error, "option_name", "")
    if ctx and option and type(error).__name__ == "NoSuchOption":
        known = [name for parameter in ctx.command.get_params(ctx) for name in parameter.opts if name.startswith("--")]
        return UsageError(f"no option {option}", command, _did_you_mean(option, known))
    return UsageError(str(message()).strip().rstrip("."), command, f"{command} --help")


def _unexpected(error: Exception) -> SurgeonError:
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"unexpected {type(error).__name__}: {first}" if first else f"unexpected {type(error).__name__}"
    return SurgeonError(what, hint="run with SURGEON_DEBUG=1 for the traceback")


def _did_you_mean(name: str, known: Sequence[str] | dict[str, str]) -> str:
    return f"did you mean {nearest(name, known)}?"


def _fail(error: SurgeonError) -> int:
    what, _, rest = str(error).partition("\n")
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[1;31m{what}\033[0m" if colour else what, rest, sep="\n" if rest else "", file=sys.stderr)
    return error.exit_code


def run() -> None:
    """The console script: `main` on the process's own arguments."""
    sys.exit(main(sys.argv[1:]))
