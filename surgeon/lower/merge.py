"""A work folder's adapters folded into a Hugging Face checkpoint: streamed, verified, then put into place.

The base is read tensor by tensor and never instantiated. What is written is checked before the folder gets its name:
probes through the adapted graph and through the merged files, one weight in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon.errors import UnsupportedError
from surgeon.fold import TRANSPOSED, Fold, by_weight, fold, folds, untied
from surgeon.graph import Graph
from surgeon.lower.hf import Derived, MergeReport, write_merged
from surgeon.lower.stream import Delta, WholeDelta
from surgeon.normal import Base, Normal
from surgeon.source import Source, Values, open_graph, open_source
from surgeon.unconvert import stored_parts
from surgeon.verification import Comparison, compare, make_probes
from surgeon.weights import ModelWeights

MANIFEST = "surgeon.json"


@dataclass(frozen=True)
class Merged:
    """A merge: what was written, and the proof that it computes what the adapted model computes."""

    written: MergeReport
    comparison: Comparison | None


def merge(
    graph: Graph,
    source: Source,
    out: str | Path,
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    tokenizer: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Merged:
    """Write the base of `graph` with its adapters folded in to the folder `out`.

    Args:
        graph: an adapted graph with trained values over the weights of `source`.
        source: the base.
        out: the new folder.
        overwrite: replace an existing folder.
        dtype: store in this dtype instead of the base's.
        verify: compare before the folder is put into place.
        tokenizer: makes the probes; without one they are random tokens.
        progress: called with (tensor, bytes done, bytes in all).

    Raises:
        CheckFailed: the merged files do not compute what the adapted graph computes; nothing is left behind.
        UnsupportedError: an adapter changes a weight that has no place in the checkpoint.
    """
    found = folds(graph)
    groups = by_weight(graph, found)
    broken = untied(graph, groups)
    deltas, extra = changes(graph, source, groups, broken)
    deltas.update(replaced(graph, source))
    update = {"tie_word_embeddings": False} if broken else None
    measured: list[Comparison] = []

    def check(folder: Path) -> None:
        if verify:
            measured.append(_verified(graph, source, folder, dtype, tokenizer))
            measured[0].require(str(out))
        manifest = {
            "base": str(source.folder),
            "base_fingerprint": source.checkpoint.fingerprint(),
            "passes": [{"name": step.name, "options": step.options()} for step in graph.applied],
            "verified": asdict(measured[0]) if measured else None,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    written = write_merged(
        source.checkpoint,
        deltas,
        out,
        extra_tensors=extra,
        config_update=update,
        dtype=dtype,
        progress=progress,
        overwrite=overwrite,
        check=check,
    )
    return Merged(written, measured[0] if measured else None)


def changes(
    graph: Graph, source: Source, groups: Mapping[str, list[Fold]], broken: Mapping[str, str]
) -> tuple[dict[str, Delta], dict[str, torch.Tensor | Derived]]:
    """The changed tensors by their stored names, and the copies that untying adds."""
    weights = _weights(graph)
    deltas: dict[str, Delta] = {}
    extra: dict[str, torch.Tensor | Derived] = {}
    for name, group in groups.items():
        normals = [item.normal(_base(graph, broken.get(name, name), item)) for item in group]
        turned = group[0].site.kind in TRANSPOSED
        stored = weights.direct(broken.get(name, name))
        if stored is None:
            deltas.update(_converted(weights, name, normals, turned, source))
        elif name in broken:
            extra[name] = Derived(stored, _rows(normals, turned))
        else:
            deltas[stored] = _rows(normals, turned)
    for alias, name in broken.items():
        if alias not in extra:
            extra[alias] = Derived(weights.direct(name) or name)
    return deltas, extra


def replaced(graph: Graph, source: Source) -> dict[str, Delta]:
    """Tensors of the base that were trained themselves, by their stored names."""
    weights = _weights(graph)
    found: dict[str, Delta] = {}
    for name, read in graph.inserted.items():
        if name in graph.values and weights.sources(name):
            for stored, value in stored_parts(weights, {name: read()}).items():
                found[stored] = WholeDelta(lambda _, v=value: v.float())  # type: ignore[misc]
    return found


def _weights(graph: Graph) -> ModelWeights:
    if not isinstance(graph.values, Values):
        raise UnsupportedError("the graph was not read from a checkpoint", graph.source, "open it with surgeon.load")
    return graph.values.weights


def _base(graph: Graph, name: str, item: Fold) -> Base:
    turned = item.site.kind in TRANSPOSED

    def weight() -> torch.Tensor:
        value = graph.values[name].float()
        return value.t() if turned else value

    return Base(weight, lambda: graph.values[item.site.bias] if item.site.bias else None)


def _rows(normals: list[Normal], turned: bool) -> Delta:
    """The change of rows of a stored tensor; rows are outputs, or inputs where it is stored transposed."""

    def delta(weight: torch.Tensor, rows: slice) -> torch.Tensor:
        if turned:
            return _folded(weight.t(), [normal.inputs(rows) for normal in normals]).t()
        return _folded(weight, [normal.outputs(rows) for normal in normals])

    return delta


def _folded(weight: torch.Tensor, normals: list[Normal]) -> torch.Tensor:
    for normal in normals:
        weight = normal.merged(weight)
    return weight


def _converted(
    weights: ModelWeights, name: str, normals: list[Normal], turned: bool, source: Source
) -> dict[str, Delta]:
    """The change of a weight that is stored in parts: the parts of its change."""
    total = None
    for normal in normals:
        delta = normal.delta()
        if delta is None or normal.u is not None or normal.s is not None:
            raise UnsupportedError(
                f"{name} is stored in parts, which this adapter cannot be split over",
                str(source.folder),
                "leave the module out with --exclude",
            )
        total = delta if total is None else total + delta
    assert total is not None
    parts = stored_parts(weights, {name: total.t() if turned else total})
    return {stored: WholeDelta(lambda weight, d=part: weight + d) for stored, part in parts.items()}  # type: ignore[misc]


def _verified(graph: Graph, source: Source, folder: Path, dtype: torch.dtype | None, tokenizer: Any) -> Comparison:
    merged_source = open_source(folder, source.task.name)
    candidate = open_graph(merged_source)

    def release() -> None:
        source.checkpoint.release()
        merged_source.checkpoint.release()

    once = fold(graph) if any(True for _ in folds(graph)) else graph
    return compare(
        graph, candidate, probes=make_probes(graph, tokenizer), rounded=_rounded(once, dtype), release=release
    )


def _rounded(graph: Graph, dtype: torch.dtype | None) -> Graph:
    """The folded graph with its weights rounded once more to the dtype they are stored in, if that is another."""
    if dtype is None:
        return graph
    import dataclasses

    return dataclasses.replace(graph, values=_Rounded(graph.values, dtype))


class _Rounded(Mapping[str, torch.Tensor]):
    def __init__(self, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.values_, self.dtype = values, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self.values_[name]
        return value.to(self.dtype) if value.is_floating_point() else value

    def __iter__(self) -> Any:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def __contains__(self, name: object) -> bool:
        return name in self.values_
