"""The README.md of a work folder: what it is, what it was made from, how to load it."""

from __future__ import annotations

from pathlib import Path

from surgeon.graph import Graph
from surgeon.manifest import Manifest
from surgeon.passes.base import Adapter

FILE = "README.md"


def render(graph: Graph, record: Manifest) -> str:
    """The card of a work folder."""
    base = record.base["path"]
    trained = sum(spec.count for spec in graph.trainable().values())
    steps = [f"- `{step.id}`: `{applied.spec()}`" for step, applied in zip(record.passes, graph.applied, strict=True)]
    head = ["---", f"base_model: {base}", "library_name: peft", f"tags: [{', '.join(_tags(record))}]", "---", ""]
    body = [
        f"# {Path(base).name}, adapted",
        "",
        f"{record.base['model_type']} for {record.task}, from `{base}` "
        f"(fingerprint `{record.base['fingerprint'][:16]}`), with {trained:,} trained parameters.",
        "",
        "Applied, in this order:",
        "",
        *steps,
        "",
        "## Loading it",
        "",
        "```python",
        "import surgeon",
        "",
        'model = surgeon.load("this/folder")',
        "```",
        "",
        _merging(graph),
        *_peft(record),
        "",
        "Saved with " + ", ".join(f"{name} {version}" for name, version in record.versions.items()) + ".",
    ]
    return "\n".join([*head, *body]) + "\n"


def _merging(graph: Graph) -> str:
    virtual = any(isinstance(step, Adapter) and not step.folds for step in graph.applied)
    kept = "; virtual tokens stay an adapter beside it, in `merged/adapter`" if virtual else ""
    return f"`surgeon merge this/folder -o merged/` folds it into a plain checkpoint{kept}."


def _tags(record: Manifest) -> list[str]:
    return ["surgeon", *dict.fromkeys(step.name for step in record.passes)]


def _peft(record: Manifest) -> list[str]:
    adapters = [step for step in record.passes if step.format == "peft"]
    if not adapters:
        return []
    place = "this/folder" if adapters[0].folder == "." else f"this/folder/{adapters[0].folder}"
    note = ["", "Each adapter is a PEFT adapter of its own; surgeon applies all of them."] if adapters[1:] else []
    return [
        "",
        "```python",
        "from peft import PeftModel",
        "",
        f'model = PeftModel.from_pretrained(base, "{place}")',
        "```",
        *note,
    ]
