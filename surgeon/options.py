"""The options of a method from its dataclass: names, types, defaults and help, for flags, spec strings and docs.

An option is a field that the `Options:` section of a class's docstring describes; other fields are the pass's own.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from surgeon.errors import UsageError, nearest
from surgeon.passes import PASSES, find
from surgeon.passes.base import Pass
from surgeon.presets import passes_of
from surgeon.select import words

_ENTRY = re.compile(r"( {4})?(\w+): (.*)")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes:
        name: of the field.
        type: "int", "float", "bool", "text", or "pairs" (`pattern=value, …`).
        default: its value if not given.
        help: one sentence.
        value: type of a pair's value, "" for the other types.
    """

    name: str
    type: str
    default: Any
    help: str
    value: str = ""

    @property
    def flag(self) -> str:
        """As written on the command line."""
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """The value that a string stands for.

        Raises:
            UsageError: it is not of the option's type.
        """
        try:
            return self._parsed(text.strip())
        except (ValueError, SyntaxError) as error:
            raise UsageError(f"{self.flag} is '{text}'", self.help, f"give {self.example}") from error

    def _parsed(self, text: str) -> Any:
        if self.type == "bool":
            if text.lower() not in (*_TRUE, *_FALSE):
                raise ValueError(text)
            return text.lower() in _TRUE
        if self.type == "pairs":
            return _pairs(text, float if self.value == "float" else int)
        if self.type in ("int", "float"):
            return int(text) if self.type == "int" else float(text)
        return ast.literal_eval(text) if text[:1] in ("'", '"') else text

    @property
    def example(self) -> str:
        """What a value looks like, for error messages."""
        examples = {
            "int": f"a whole number, for example {self.default}",
            "float": f"a number, for example {self.default}",
            "bool": "true or false",
            "pairs": "pattern=value pairs, for example '*.q_proj=16, *.v_proj=4'",
        }
        return examples.get(self.type, "a text")


def _pairs(text: str, number: type) -> tuple[tuple[str, Any], ...]:
    """`*.q_proj=16, *.v_proj=4`, or the tuple that `spec()` writes."""
    if text.startswith("("):
        return tuple((str(pattern), number(value)) for pattern, value in ast.literal_eval(text))
    pairs = [word.rpartition("=") for word in words(text)]
    if not all(pattern for pattern, _, _ in pairs):
        raise ValueError(text)
    return tuple((pattern, number(value)) for pattern, _, value in pairs)


def options_of(method: type[Pass]) -> list[Option]:
    """A method's options: its own before those it inherits, each in the order of the docstring."""
    described: dict[str, str] = {}
    for kind in method.__mro__:
        if kind.__doc__ and issubclass(kind, Pass):
            for name, text in _described(kind.__doc__):
                described.setdefault(name, text)
    fields = {field.name: field for field in dataclasses.fields(method)}
    return [_option(fields[name], text) for name, text in described.items() if name in fields]


def _described(docstring: str) -> Iterator[tuple[str, str]]:
    """The entries of the `Options:` section: name and text, continuation lines joined."""
    _, _, section = inspect.cleandoc(docstring).partition("Options:\n")
    name, lines = "", list[str]()
    for line in [*section.splitlines(), "end"]:
        entry = _ENTRY.fullmatch(line)
        outside = bool(line) and not line.startswith(" ")
        if name and ((entry and entry.group(1)) or outside):
            yield name, " ".join(lines)
            name, lines = "", []
        if outside:
            return
        if entry and entry.group(1):
            name, lines = entry.group(2), [entry.group(3)]
        elif name and line.strip():
            lines.append(line.strip())


def _option(field: dataclasses.Field[Any], text: str) -> Option:
    default, kind = field.default, str(field.type)
    if kind.startswith("tuple"):
        return Option(field.name, "pairs", default, text, "float" if "float" in kind else "int")
    return Option(field.name, {"str": "text"}.get(kind, kind), default, text)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and options of `name` or `name(option=value, …)`, as `Pass.spec` writes it; quotes may be left out.

    The name of a preset stands for all its passes: its options are theirs.

    Raises:
        UsageError: the name or an option is unknown, a value has the wrong type, or the string is not of that form.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", spec, re.DOTALL)
    if match is None:
        raise UsageError(f"'{spec}' is not a method", "--method", "for example lora, or 'lora(rank=8, targets=q_proj)'")
    name, inside = match.group(1).replace("-", "_"), match.group(2) or ""
    known = {option.name: option for step in passes_of(name) for option in options_of(find(step))}
    values: dict[str, Any] = {}
    for part in _arguments(inside):
        key, equals, text = part.partition("=")
        option = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(
                f"'{part.strip()}' in '{spec}' is not an option=value", "--method", f"options: {', '.join(known)}"
            )
        if option not in known:
            raise UsageError(
                f"{name} has no option '{option}'", f"--method '{spec}'", f"nearest: {nearest(option, known)}"
            )
        values[option] = known[option].parse(text)
    return name, values


def documented_spec(step: Pass) -> str:
    """`Pass.spec` of the options alone, without what a pass keeps for itself."""
    kept = {field.name: field.default for field in dataclasses.fields(step)}
    for option in options_of(type(step)):
        kept[option.name] = getattr(step, option.name)
    return type(step)(**kept).spec()


def _arguments(text: str) -> Iterator[str]:
    """`a=1, b='x, y', c=*.{q,v}_proj` at the commas before each `name=`, not inside quotes or brackets."""
    depth, quote, start = 0, "", 0
    for position, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
            if letter == "," and depth == 0 and re.match(r"\s*[\w-]+\s*=", text[position + 1 :]):
                yield text[start:position]
                start = position + 1
    if text[start:].strip():
        yield text[start:]


def methods() -> dict[str, type[Pass]]:
    """Every registered pass by name."""
    return {name: find(name) for name in PASSES}


def summary(method: type[Pass]) -> str:
    """The first paragraph of a method's documentation on one line."""
    return inspect.cleandoc(method.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def equation(method: type[Pass]) -> str:
    """The first paragraph of the docstring of the file the method is in: what it computes, and whose it is."""
    module = inspect.getmodule(method)
    return inspect.cleandoc((module.__doc__ or "") if module else "").partition("\n\n")[0].replace("\n", " ")
