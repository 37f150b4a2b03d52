"""The classes of a classifier: what they are called, where the names come from, and which id a row's label is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from surgeon.data import Row, cells
from surgeon.errors import UsageError, nearest

LABELLED = ("sequence-classification", "token-classification")
"""The tasks whose head has one output per class."""
LABEL_KEYS = {
    "sequence-classification": ("label", "labels"),
    "token-classification": ("labels", "tags", "ner_tags", "label"),
}
_PLACEHOLDER = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Labels:
    """The classes in the order of their ids. A regression has one, whose name means nothing."""

    names: tuple[str, ...]
    regression: bool = False

    @property
    def named(self) -> bool:
        """Whether the names say something: transformers calls classes it knows nothing of LABEL_0, LABEL_1."""
        return not all(_PLACEHOLDER.fullmatch(name) for name in self.names)

    def id_of(self, value: Any, where: str) -> int:
        """The id of a row's label, given by name or, unless the names are numbers themselves, by id.

        Raises UsageError for a label that is neither, with the place it stands at.
        """
        name = name_of(value, where)
        if name in self.names:
            return self.names.index(name)
        if name.isdecimal() and int(name) < len(self.names) and not all(n.isdecimal() for n in self.names):
            return int(name)
        what = f"unknown label '{name}': the model has {len(self.names)} classes"
        if not self.named:
            raise UsageError(f"{what} without names", where, f"ids 0 to {len(self.names) - 1}, or name the classes")
        raise UsageError(f"{what}: {', '.join(self.names[:8])}", where, f"nearest: {nearest(name, self.names)}")


def labels_of(config: Any) -> Labels:
    """The classes that a Hugging Face config names."""
    table = {int(key): str(name) for key, name in config.id2label.items()}
    names = tuple(table.get(i, f"LABEL_{i}") for i in range(config.num_labels))
    return Labels(names, regression=config.problem_type == "regression" or len(names) == 1)


def name_of(value: Any, where: str) -> str:
    """A label as a name: numbers as whole numbers, texts as they are. Raises UsageError for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)):
        what = f"a label is {value!r}, neither a name nor a whole number"
        raise UsageError(what, where, "for numbers to predict, make a regression: surgeon apply --labels 1")
    return str(value)


def label_in(row: Row, task: str) -> Any:
    """What a row has for its label or, for token classification, its list of labels. Raises UsageError if nothing."""
    keys = LABEL_KEYS[task]
    for key in keys:
        if key in row.values:
            return cells(row, key) if task == "token-classification" else row.values[key]
    raise UsageError("this row has no label", row.where, f"give each row `{keys[0]}`")


def names_in(rows: Iterable[Row], task: str) -> tuple[str, ...]:
    """The names of all labels of the data, sorted: numbers by their value, others by their letters."""
    found: set[str] = set()
    for row in rows:
        given = label_in(row, task)
        values = given if isinstance(given, list) else [given]
        found.update(name_of(value, row.where) for value in values if value != -100)
    if all(name.isdecimal() for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def chosen(rows: Sequence[Row], config: Any, task: str, *, open_head: bool) -> tuple[str, ...] | None:
    """The names that training on `rows` gives the classes, or None to keep those of the config.

    Real names in the config stay. Otherwise a head that is new and whose size nobody chose (`open_head`) takes the
    classes of the data; one of a fixed size takes their names, if there are as many.

    Raises UsageError for data with one class alone, or with another number of classes than the head.
    """
    if task not in LABELLED:
        return None
    own = labels_of(config)
    if own.regression:
        return None
    found, where = names_in(rows, task), str(rows[0].file)
    if own.named and (not open_head or set(found) <= set(own.names)):
        return None
    if len(found) < 2:
        what = f"all labels of the data are the same: {', '.join(found)}"
        raise UsageError(what, where, "give rows of at least two classes, or name them: surgeon apply --labels a,b")
    if open_head:
        return found
    if all(name in own.names or (name.isdecimal() and int(name) < len(own.names)) for name in found):
        return None
    if len(found) != len(own.names):
        what = f"the data has {len(found)} classes ({', '.join(found[:8])}), the model's head {len(own.names)}"
        raise UsageError(what, where, "begin with a new head: surgeon apply --labels " + ",".join(found[:4]) + ",…")
    return found


def placeholders(count: int) -> tuple[str, ...]:
    """What transformers calls classes it has no names for."""
    return tuple(f"LABEL_{number}" for number in range(count))


def parse_labels(text: str, task: str) -> tuple[str, ...]:
    """Class names as written on a command line: `neg,pos`, a number of classes, or a data file to take them from."""
    from pathlib import Path

    from surgeon.data import load_rows

    if text.isdecimal() and int(text) > 0:
        return placeholders(int(text))
    if Path(text).is_file():
        return names_in(load_rows(text), task if task in LABELLED else LABELLED[0])
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(names) < 2 or len(set(names)) != len(names):
        hint = "names like neg,pos, how many classes there are (1 for a regression), or a data file"
        raise UsageError(f"'{text}' names no classes", "--labels", hint)
    return names
