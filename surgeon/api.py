"""The Python interface: the command line's verbs as functions. `import surgeon` gives them lazily."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from surgeon import run, store
from surgeon.errors import UsageError
from surgeon.fold import fold, folds
from surgeon.graph import Graph
from surgeon.lower.bake import Baked
from surgeon.lower.bake import bake as bake_folder
from surgeon.lower.merge import Merged
from surgeon.lower.merge import merge as merge_folder
from surgeon.model import SurgeonModel, load_model
from surgeon.passes.base import Pass
from surgeon.presets import steps_of
from surgeon.ranks import at_rank
from surgeon.remote_code import code_refused, is_trusted
from surgeon.source import Source, open_graph, open_source
from surgeon.verification import Comparison, compare, make_probes

if TYPE_CHECKING:
    from surgeon.lower.into import Into
    from surgeon.lower.quantise import Quantised


def plan(base: str | Path, method: str | Pass = "lora", *, task: str | None = None, **options: Any) -> Any:
    """What a method would cost on a base: sites, parameters, bytes, FLOPs; from config.json alone.

    Args:
        base: folder or hub id.
        method: name of a pass or preset, or a pass.
        task: see `surgeon.tasks`.
        options: of the method.
    """
    from surgeon import planning

    graph = open_graph(open_source(base, task, weights=False), values=False)
    return planning.plan(graph, *_steps(method, options))


def apply(
    base: str | Path | SurgeonModel,
    method: str | Pass = "lora",
    *,
    task: str | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    labels: Sequence[str] = (),
    context: int = 0,
    **options: Any,
) -> SurgeonModel:
    """A base with a method applied, ready to train. Applying to a model stacks.

    Args:
        base: folder, hub id, work folder, or a model from `load` or `apply`.
        method: name of a pass or preset, or a pass.
        task: see `surgeon.tasks`.
        seed: of the first values of what is inserted.
        dtype: the dtype of the model; None keeps the checkpoint's.
        labels: names of the classes of a classifier, for a new head; one name makes a regression.
        context: length in tokens to scale the base's positions to; 0 keeps its own.
        options: of the method.
    """
    if isinstance(base, SurgeonModel):
        graph, tokenizer = base.trained(), base.tokenizer
    else:
        graph, tokenizer = read(base, task, labels=labels, seed=seed, context=context), tokenizer_of(base)
    applied = run.apply(graph, *_steps(method, options), seed=seed, tokenizer=tokenizer)
    model = load_model(applied, dtype=dtype)
    model.tokenizer = tokenizer
    return model


def load(
    folder: str | Path,
    *,
    task: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rank: int | None = None,
) -> SurgeonModel:
    """A work folder, a PEFT adapter folder or a plain checkpoint as a model that runs, trains and generates.

    Args:
        folder: the folder, or a hub id.
        task: for plain checkpoints, see `surgeon.tasks`.
        base: the base, where the folder's own record of it no longer holds.
        dtype: the dtype of the model; None keeps the checkpoint's.
        device: where its tensors go.
        rank: of adapters that have every rank (DyLoRA); their highest if not given.
    """
    graph = read(folder, task, base, rank=rank)
    model = load_model(graph, dtype=dtype, device=device)
    model.tokenizer = tokenizer_of(folder) or tokenizer_of(graph.source)
    return model


def read(
    folder: str | Path,
    task: str | None = None,
    base: str | Path | None = None,
    *,
    labels: Sequence[str] = (),
    seed: int = 0,
    context: int = 0,
    rank: int | None = None,
) -> Graph:
    """The graph of a work folder, a PEFT adapter folder or a plain checkpoint, with values.

    `labels`, `seed` and `context` are for plain checkpoints: the classes and the first values of a new head, and the
    length to scale positions to. `rank` is that of adapters that have every rank.
    """
    adapted = store.is_work_folder(folder) or store.is_adapter_folder(folder) or store.has_rest(folder)
    if adapted and context:
        what = "the context is chosen when the first method is applied"
        raise UsageError(what, str(folder), "leave --context out, or apply to the base itself")
    if adapted:
        graph = _opened(folder, base)
    else:
        graph = open_graph(open_source(folder, task, labels=labels, context=context), seed=seed)
    return graph if rank is None else at_rank(graph, rank)


def _opened(folder: str | Path, base: str | Path | None) -> Graph:
    if store.is_work_folder(folder):
        return store.load(folder, base)
    if store.is_adapter_folder(folder):
        return store.load_adapter(folder, base)
    return store.load(Path(folder, store.REST), folder)


def merge(
    work: str | Path | SurgeonModel | Graph,
    out: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    strict: bool = False,
    rank: int | None = None,
    progress: Any = None,
) -> Merged:
    """Fold the adapters of a work folder or PEFT adapter folder into a plain Hugging Face checkpoint, and prove it.

    Virtual tokens do not fold: they are written beside the weights, and `surgeon.load(out)` puts them on again.
    With `strict` they are refused.

    Raises:
        CheckFailed: what would be written does not compute what the adapted model computes.
        UsageError: there is nothing to merge, or `rank` is not one the adapters were trained at.
    """
    graph = to_merge(work, base, rank)
    source = base_of(graph)
    return merge_folder(
        graph,
        source,
        out,
        overwrite=overwrite,
        dtype=dtype,
        verify=verify,
        strict=strict,
        tokenizer=tokenizer_of(source.folder),
        progress=progress,
    )


def to_merge(work: str | Path | SurgeonModel | Graph, base: str | Path | None = None, rank: int | None = None) -> Graph:
    """The graph of what is to be merged; raises UsageError if there is nothing to merge, or `rank` is none of its."""
    if isinstance(work, Graph):
        return work
    graph = work.trained() if isinstance(work, SurgeonModel) else read(work, base=base)
    graph = graph if rank is None else at_rank(graph, rank)
    if not graph.applied:
        raise UsageError(
            "there is nothing to merge: this is a plain checkpoint", str(work), "give a work or adapter folder"
        )
    return graph


def merge_into(
    work: str | Path | SurgeonModel | Graph,
    out: str | Path,
    *,
    into: str = "dequant",
    accept_error: bool = False,
    base: str | Path | None = None,
    **options: Any,
) -> Into:
    """Merge over a quantised base one way, see `surgeon.lower.into`; `options` are those of its `merge_into`.

    Raises:
        CheckFailed: the outputs would change by more than the limit, and `accept_error` was not given.
        UsageError: the base is not quantised, or the adapters do not fit that way.
    """
    from surgeon.lower.into import merge_into as merge_graph_into

    graph = to_merge(work, base)
    source = base_of(graph)
    tokenizer = tokenizer_of(source.folder)
    return merge_graph_into(graph, source, out, into=into, accept_error=accept_error, tokenizer=tokenizer, **options)


def quantise(
    base: str | Path,
    out: str | Path,
    method: str | Pass = "nf4",
    *,
    form: str = "",
    task: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Any = None,
    **options: Any,
) -> Quantised:
    """Write a checkpoint with its linears in codes, see `surgeon.lower.quantise`.

    Args:
        base: folder or hub id.
        out: the new folder.
        method: "nf4" or "intq", or such a pass.
        form: "bitsandbytes", "gptq", "gptq_v2", "compressed-tensors" or "surgeon"; "" for the method's default.
        task: see `surgeon.tasks`.
        verify: read it again, and compare.
        overwrite: replace an existing folder.
        progress: called with (tensor, bytes done, bytes in all).
        options: of the method.

    Raises:
        UsageError: the method is none that quantises, or the base is not plain.
        UnsupportedError: its codes have no place in the form.
    """
    from surgeon.lower.quantise import quantise as write
    from surgeon.passes.quantiser import Quantiser

    step = _steps(method, options)[0]
    if not isinstance(step, Quantiser):
        raise UsageError(f"{step.name} is no way to quantise", "method", "one of nf4, intq")
    graph = read(base, task)
    source, tokenizer = base_of(graph), tokenizer_of(graph.source)
    return write(
        graph, source, step, out, form=form, verify=verify, tokenizer=tokenizer, overwrite=overwrite, progress=progress
    )


def bake(
    work: str | Path | SurgeonModel, out: str | Path, *, base: str | Path | None = None, overwrite: bool = False
) -> Baked:
    """Write the base of a prompt with the prompt's rows as new words of its vocabulary, and prove it.

    What folds into weights is merged before.

    Raises:
        CheckFailed: what would be written does not compute what the prompted model computes.
        UnsupportedError: what does not fold is not one prompt that words can stand for.
    """
    graph = work.trained() if isinstance(work, SurgeonModel) else read(work, base=base)
    source = base_of(graph)
    with tempfile.TemporaryDirectory(prefix=".bake-", dir=Path(out).absolute().parent) as place:
        if folds(graph):
            merge_folder(graph, source, Path(place, "merged"), tokenizer=tokenizer_of(source.folder))
            graph = read(Path(place, "merged"))
        tokenizer, name = tokenizer_of(source.folder), source.name
        return bake_folder(graph, base_of(graph), out, tokenizer=tokenizer, base=name, overwrite=overwrite)


def export(work: str | Path, out: str | Path, *, target: str = "onnx", **options: Any) -> Any:
    """Lower a model to what production runs: "hf" (a merged checkpoint) or "onnx"."""
    from surgeon import lower

    return lower.export(work, out, target=target, **options)


def verify(first: str | Path, second: str | Path, *, task: str | None = None) -> Comparison:
    """Whether two folders compute the same function, measured on probes; `.ok` says so."""
    reference, candidate = read(first, task), read(second, task)
    dtypes = [stored_dtype_of(graph) for graph in (reference, candidate)]
    coarser = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    tokenizer = tokenizer_of(reference.source) or tokenizer_of(candidate.source)
    rounded = None
    if folds(reference) and not folds(candidate):
        rounded = fold(reference)
    return compare(reference, candidate, probes=make_probes(reference, tokenizer), rounded=rounded, dtype=coarser)


def stored_dtype_of(graph: Graph) -> torch.dtype:
    """The dtype of the graph's first floating weight."""
    return next(
        graph.values[name].dtype
        for name, spec in graph.tensors.items()
        if spec.parameter and name in graph.values and graph.values[name].is_floating_point()
    )


def base_of(graph: Graph) -> Source:
    """The base a graph was read from."""
    return open_source(graph.source, graph.task, labels=graph.labels, context=graph.context)


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer of a folder, or None if it has none."""
    if not any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    with code_refused(Path(folder)):
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=is_trusted())


def _steps(method: str | Pass, options: dict[str, Any]) -> list[Pass]:
    if isinstance(method, Pass):
        return [dataclasses.replace(method, **options) if options else method]
    return steps_of(method, options)
