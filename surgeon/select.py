"""Target patterns: which sites a pass works on.

A pattern is one or more words separated by commas or spaces (braces group): `*.{q,v}_proj`, `model.layers.[0-3].*`,
`q_proj v_proj`, `all-linear` (every linear but the head), `attention-linear` (those inside attentions), `all-experts`
(the matrices of experts that are kept in one tensor, as transformers does it since version 5; `all-linear` is without
them, as it is without convolutions, and says so). A word without a dot or wildcard matches a module of that name
anywhere, as in PEFT's lists; `re:` before a word makes it a regular expression over the whole path, as in PEFT's
strings.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from surgeon.errors import UsageError, nearest

ALL_LINEAR, ATTENTION_LINEAR, ALL_EXPERTS = "all-linear", "attention-linear", "all-experts"
_RESERVED = (ALL_LINEAR, ATTENTION_LINEAR, ALL_EXPERTS)
ALL_EMBEDDINGS, ALL_NORMS = "all-embeddings", "all-norms"
T = TypeVar("T")


def words(pattern: str) -> list[str]:
    """The single patterns of a target pattern, braces expanded."""
    found, depth, word = [], 0, ""
    if pattern.startswith("re:"):
        return [pattern]
    for letter in pattern + ",":
        depth += (letter == "{") - (letter == "}")
        if letter in ", " and depth == 0:
            found += _expanded(word) if word else []
            word = ""
        else:
            word += letter
    return found


def _expanded(word: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", word)
    if match is None:
        return [word]
    head, tail = word[: match.start()], word[match.end() :]
    return [made for choice in match.group(1).split(",") for made in _expanded(head + choice.strip() + tail)]


@functools.lru_cache(maxsize=1024)
def _matcher(word: str) -> re.Pattern[str]:
    try:
        if word.startswith("re:"):
            return re.compile(word[3:])
        if not any(letter in word for letter in "*?["):
            return re.compile(rf"(?:.*\.)?{re.escape(word)}")
        return re.compile(fnmatch.translate(word))
    except re.error as error:
        raise UsageError(f"'{word}' is not a pattern: {error}", "--targets", "for example '*.{q,v}_proj'") from error


def matches(pattern: str, path: str) -> bool:
    """Whether a module path is matched by any word of the pattern."""
    return any(_matcher(word).fullmatch(path) for word in words(pattern))


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """The numbers of `0,3` or `0-3,6`, in order, each once.

    Raises:
        UsageError: it is written otherwise; `flag` says where.
    """
    found: set[int] = set()
    for word in filter(None, text.replace(" ", ",").split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UsageError(f"'{word}' is no number and no range of them", flag, "for example 0,3 or 0-3,6")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def grouped(values: Mapping[str, T]) -> tuple[tuple[str, T], ...]:
    """(pattern, value) pairs for values by path; paths that differ in one layer's number share a pattern."""
    found: dict[tuple[str, str, T], list[str]] = {}
    for path, value in values.items():
        words_ = path.split(".")
        at = next((position for position, word in enumerate(words_) if word.isdigit()), len(words_))
        head, tail = ".".join(words_[:at]), ".".join(words_[at + 1 :])
        found.setdefault((head, tail, value), []).append(words_[at] if at < len(words_) else "")
    pairs = []
    for (head, tail, value), numbers in found.items():
        middle = numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"
        pairs.append((".".join(filter(None, [head, middle, tail])), value))
    return tuple(pairs)


def by_pattern(values: Mapping[str, T]) -> tuple[tuple[str, T], ...]:
    """As `grouped`, and sure to give every path its value."""
    pairs = grouped(values)
    if all(next(v for pattern, v in pairs if matches(pattern, path)) == value for path, value in values.items()):
        return pairs
    return tuple((f"re:{re.escape(path)}", value) for path, value in values.items())


def check_words(pattern: str, paths: Iterable[str]) -> None:
    """Raise UsageError for a word that matches none of the paths, naming the nearest one."""
    known = list(paths)
    for word in words(pattern):
        if word not in _RESERVED and not any(_matcher(word).fullmatch(path) for path in known):
            raise UsageError(f"no module matches '{word}'", "--targets", _suggestion(word, known))


def _suggestion(word: str, paths: list[str]) -> str:
    leaf = word.removeprefix("re:").rpartition(".")[2].strip("*?")
    leaves = nearest(leaf, (path.rpartition(".")[2] for path in paths), 1)
    example = next((path for path in paths if path.endswith(leaves)), paths[0] if paths else "")
    return f"the model has e.g. '{example}'" if example else "the model has no module this method fits"
