"""Data for a model, whatever its task: the samples of a file, how long they may be, and the batches they come in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgeon.context import limit
from surgeon.data import Collator, Row, load_rows
from surgeon.examples import ExampleCollator, Examples
from surgeon.heads import HEADED
from surgeon.render import Rendered, render_rows
from surgeon.render_tasks import render_examples
from surgeon.tasks import TASKS

Data = Rendered | Examples
_UNLIMITED = 10**6


def task_of(model: Any) -> str:
    """What a model is for: the task its graph was captured for, or what the class of a transformers model says."""
    graph = getattr(model, "graph", None)
    if graph is not None and hasattr(graph, "task"):
        return str(graph.task)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(plain).__name__
    return next((task.name for task in TASKS.values() if name.endswith(task.suffixes)), "causal-lm")


def samples_for(
    model: Any, tokenizer: Any, data: Data | Sequence[Row] | str | Path, max_length: int | None = None
) -> Data:
    """The samples of a file or of rows for a model's task, cut to `max_length`, or to what the model can read.

    Raises UsageError for bad data, with file and line.
    """
    if isinstance(data, (Rendered, Examples)):
        return data
    rows = load_rows(data) if isinstance(data, (str, Path)) else data
    task, limit = task_of(model), max_length or longest(model, tokenizer)
    if task == "causal-lm":
        return render_rows(rows, tokenizer, limit)
    return render_examples(rows, tokenizer, task, model.config, limit)


def longest(model: Any, tokenizer: Any) -> int | None:
    """The most tokens of a sample: the model's positions, less those of virtual tokens before it; None for no limit."""
    positions = limit(model.config)
    known = [positions] if positions else []
    # RoBERTa's table of positions is longer than the texts it can read; its tokenizer knows.
    own = getattr(tokenizer, "model_max_length", None)
    if task_of(model) in HEADED and isinstance(own, int) and own < _UNLIMITED:
        known.append(own)
    return min(known) - virtual_tokens(model) if known else None


def virtual_tokens(model: Any) -> int:
    """The positions that prefixes and prompts take."""
    applied = getattr(getattr(model, "graph", None), "applied", ())
    return sum(count for step in applied if isinstance(count := getattr(step, "tokens", 0), int))


def collator_for(data: Data, tokenizer: Any, config: Any) -> Collator | ExampleCollator:
    """What makes batches of these samples, for a model of this config."""
    return Collator.of(tokenizer) if isinstance(data, Rendered) else ExampleCollator.of(tokenizer, config)
