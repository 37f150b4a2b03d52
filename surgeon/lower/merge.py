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

from surgeon import context
from surgeon.errors import UnsupportedError
from surgeon.fold import Fold, by_bias, by_weight, fold, folds, normals, stacked, untied, value_of
from surgeon.graph import Graph
from surgeon.heads import head_config
from surgeon.lower import rest
from surgeon.lower.held import held_deltas, held_names
from surgeon.lower.hf import Derived, MergeReport, write_merged
from surgeon.lower.stream import Delta, WholeDelta
from surgeon.normal import Normal
from surgeon.sites import CONV
from surgeon.source import Source, Values, open_graph, open_source
from surgeon.unconvert import stored_parts
from surgeon.verification import Comparison, compare, make_probes
from surgeon.weights import ModelWeights

MANIFEST = "surgeon.json"


@dataclass(frozen=True)
class Merged:
    """A merge: what was written, and the proof that it computes what the adapted model computes.

    Attributes:
        written: the checkpoint's files.
        comparison: merged weights, with the rest on them, against the adapted model; None if it was not asked for.
        rest: ids of the adapters that did not fold; they are in the folder `surgeon.lower.rest.FOLDER` beside them.
    """

    written: MergeReport
    comparison: Comparison | None
    rest: tuple[str, ...] = ()


def merge(
    graph: Graph,
    source: Source,
    out: str | Path,
    *,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    tokenizer: Any = None,
    strict: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Merged:
    """Write the base of `graph` with its adapters folded in to the folder `out`; those that do not fold lie beside.

    Args:
        graph: an adapted graph with trained values over the weights of `source`.
        source: the base.
        out: the new folder.
        overwrite: replace an existing folder.
        dtype: store in this dtype instead of the base's.
        verify: compare before the folder is put into place.
        tokenizer: makes the probes; without one they are random tokens.
        strict: refuse if an adapter does not fold.
        progress: called with (tensor, bytes done, bytes in all).

    Raises:
        CheckFailed: the merged files do not compute what the adapted graph computes; nothing is left behind.
        UnsupportedError: an adapter changes a weight that has no place in the checkpoint, or does not fold.
    """
    if strict:
        rest.require_none(graph, out)
    found, left = folds(graph), rest.left_over(graph)
    groups = by_weight(graph, found)
    broken = untied(graph, groups)
    held = set(held_names(graph))
    deltas, extra = changes(graph, source, {name: g for name, g in groups.items() if name not in held}, broken)
    deltas.update(held_deltas(graph, _weights(graph), groups) if held else {})
    deltas.update(replaced(graph, source))
    fresh = added(graph)
    extra.update(fresh)
    apart = bool(broken) or any(name in _weights(graph).tied for name in fresh)
    scaled = context.update(graph.config, source.checkpoint.config) if graph.context else {}
    update = head_config(graph) | scaled | ({"tie_word_embeddings": False} if apart else {})
    finish = _Finish(graph, source, Path(out), left, verify, dtype, tokenizer)
    written = write_merged(
        source.checkpoint,
        deltas,
        out,
        extra_tensors=extra,
        config_update=update,
        dtype=dtype,
        progress=progress,
        overwrite=overwrite,
        check=finish,
    )
    return Merged(written, finish.comparison, left)


@dataclass
class _Finish:
    """What happens to the written folder before it gets its name: the rest beside it, the comparison, the manifest."""

    graph: Graph
    source: Source
    out: Path
    left: tuple[str, ...]
    verify: bool
    dtype: torch.dtype | None
    tokenizer: Any
    comparison: Comparison | None = None

    def __call__(self, folder: Path) -> None:
        if self.left or self.verify:
            merged_source = open_source(folder, self.source.task.name)
            candidate = rest.put_back(self.graph, open_graph(merged_source))
            if self.left:
                rest.write(candidate, folder, self.out)
            if self.verify:
                made = _verified(self.graph, self.source, candidate, merged_source, self.dtype, self.tokenizer)
                made.require(str(self.out))
                self.comparison = made
        (folder / MANIFEST).write_text(json.dumps(self._manifest(), indent=2) + "\n")

    def _manifest(self) -> dict[str, Any]:
        return {
            "base": self.source.name,
            "base_fingerprint": self.source.checkpoint.fingerprint(),
            "passes": [{"name": step.name, "options": step.options()} for step in self.graph.applied],
            "rest": {"folder": rest.FOLDER, "adapters": self.left} if self.left else None,
            "verified": asdict(self.comparison) if self.comparison else None,
        }


def changes(
    graph: Graph, source: Source, groups: Mapping[str, list[Fold]], broken: Mapping[str, str]
) -> tuple[dict[str, Delta], dict[str, torch.Tensor | Derived]]:
    """The changed tensors by their stored names, and the copies that untying adds."""
    weights = _weights(graph)
    deltas: dict[str, Delta] = {}
    extra: dict[str, torch.Tensor | Derived] = {}
    for name, group in groups.items():
        found = _normals(graph, group, broken.get(name, name))
        stored = weights.direct(broken.get(name, name))
        if stored is None:
            deltas.update(_converted(weights, name, found, group, source))
        elif name in broken:
            extra[name] = Derived(stored, _rows(found, group))
        else:
            deltas[stored] = _rows(found, group)
    for alias, name in broken.items():
        if alias not in extra:
            extra[alias] = Derived(weights.direct(name) or name)
    return deltas, extra


def replaced(graph: Graph, source: Source) -> dict[str, Delta]:
    """Tensors of the base that were trained themselves, and biases that adapters change, by their stored names."""
    weights = _weights(graph)
    found: dict[str, Delta] = {}
    fresh = added(graph)
    trained = {name: read() for name, read in graph.inserted.items() if name in graph.values and name not in fresh}
    for name, tensor in {**trained, **biases(graph)}.items():
        for stored, value in stored_parts(weights, {name: tensor}).items():
            found[stored] = WholeDelta(lambda _, v=value: v.float())  # type: ignore[misc]
    return found


def added(graph: Graph) -> dict[str, torch.Tensor]:
    """Trained tensors the checkpoint has no place for: a new head, and one of a tied pair that no longer is tied."""
    weights = _weights(graph)
    return {
        name: read()
        for name, read in graph.inserted.items()
        if name in graph.values and (not weights.sources(name) or (name in weights.tied and name not in graph.ties))
    }


def _weights(graph: Graph) -> ModelWeights:
    if not isinstance(graph.values, Values):
        raise UnsupportedError("the graph was not read from a checkpoint", graph.source, "open it with surgeon.load")
    return graph.values.weights


def _normals(graph: Graph, group: list[Fold], name: str) -> list[Normal]:
    """The normal forms of the adapters of the weight `name`."""
    site = group[0].site
    return normals(
        group,
        lambda: site.matrix(value_of(graph, name).float()),
        lambda: value_of(graph, site.bias) if site.bias else None,
    )


def _rows(found: list[Normal], group: list[Fold]) -> Delta:
    """The change of rows of a stored tensor; rows are experts, or outputs, or inputs where it is stored transposed."""
    site = group[0].site
    if site.kind == CONV:
        return WholeDelta(lambda weight: site.stored(stacked(site.matrix(weight), found)))

    def delta(weight: torch.Tensor, rows: slice) -> torch.Tensor:
        if site.experts:
            parts = [normal.experts(rows) for normal in found]
        else:
            parts = [normal.inputs(rows) if site.transposed else normal.outputs(rows) for normal in found]
        return site.stored(stacked(site.matrix(weight), parts))

    return delta


def biases(graph: Graph) -> dict[str, torch.Tensor]:
    """The biases that adapters change, in fp32, by their names in the model."""
    changed: dict[str, torch.Tensor] = {}
    for name, group in by_bias(graph, folds(graph)).items():
        for normal in _normals(graph, group, group[0].site.weight):
            if normal.bias is not None:
                changed[name] = normal.bias.float()
    return changed


def _converted(
    weights: ModelWeights, name: str, found: list[Normal], group: list[Fold], source: Source
) -> dict[str, Delta]:
    """The change of a weight that is stored in parts: the parts of its change."""
    total = None
    for normal in found:
        delta = normal.delta()
        if delta is None or normal.u is not None or normal.s is not None:
            raise UnsupportedError(
                f"{name} is stored in parts, which this adapter cannot be split over",
                str(source.folder),
                "leave the module out with --exclude",
            )
        total = delta if total is None else total + delta
    assert total is not None
    parts = stored_parts(weights, {name: group[0].site.stored(total)})
    return {stored: WholeDelta(lambda weight, d=part: weight + d) for stored, part in parts.items()}  # type: ignore[misc]


def _verified(
    graph: Graph, source: Source, candidate: Graph, merged: Source, dtype: torch.dtype | None, tokenizer: Any
) -> Comparison:
    def release() -> None:
        source.checkpoint.release()
        merged.checkpoint.release()

    once = fold(graph) if folds(graph) else graph
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
