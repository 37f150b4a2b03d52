"""The heads of classifiers: which modules they are, whether a checkpoint has them, and giving them another size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers

from surgeon.labels import LABELLED
from surgeon.sites import EMBEDDING, sites
from surgeon.tasks import TASKS

if TYPE_CHECKING:
    from surgeon.graph import Graph
    from surgeon.source import Source

HEADED = ("sequence-classification", "token-classification", "question-answering", "multiple-choice")
"""The tasks whose models are an encoder or decoder with a small head of their own."""
_OUTPUTS = {"classifier", "score", "classification_head"}


def head_modules(graph: Graph) -> tuple[str, ...]:
    """The modules of a task's head: what stands beside the encoder or decoder, which has the layers and embeddings."""
    if graph.task not in HEADED:
        return ()
    body = {path.partition(".")[0] for path in graph.layers}
    body |= {site.path.partition(".")[0] for site in sites(graph, EMBEDDING)}
    names = [name for name, spec in graph.tensors.items() if not spec.owner and "." in name]
    return tuple(dict.fromkeys(root for name in names if (root := name.partition(".")[0]) not in body))


def fresh_modules(graph: Graph, source: Source) -> tuple[str, ...]:
    """The modules whose values are new: the head, where the base was trained for something else.

    Told by the config alone, so that `plan` counts them too; with the weights also what else the checkpoint lacks.
    """
    if graph.task not in HEADED:
        return ()
    trained_for = graph.config.architectures or []
    found = list(head_modules(graph)) if _is_new(trained_for, source) else []
    missing = getattr(getattr(graph.values, "weights", None), "missing", ())
    for name in missing:
        module = name.rpartition(".")[0]
        if not any(module == path or module.startswith(f"{path}.") for path in found):
            found.append(module)
    return tuple(found)


def _is_new(trained_for: list[str], source: Source) -> bool:
    return bool(source.labels) or not any(name.endswith(source.task.suffixes) for name in trained_for)


def head_config(graph: Graph) -> dict[str, Any]:
    """What a checkpoint's config.json must say about a head that its base did not have."""
    config = graph.config
    if not graph.fresh and not graph.labels:
        return {}
    auto: Any = getattr(transformers, TASKS[graph.task].auto_class)
    found: dict[str, Any] = {"architectures": [auto._model_mapping[type(config)].__name__]}
    if graph.task in LABELLED:
        found["id2label"] = {str(number): name for number, name in config.id2label.items()}
        found["label2id"] = dict(config.label2id)
    if graph.task == "sequence-classification" and config.pad_token_id is not None:
        found["pad_token_id"] = config.pad_token_id
    return found | ({"problem_type": config.problem_type} if config.problem_type else {})


def classes_in(tensors: Mapping[str, torch.Tensor]) -> int:
    """How many classes the head saved in an adapter's file has, 0 if it has no head."""
    names = [key for key in tensors if key.endswith(".weight") and _OUTPUTS & set(key.split("."))]
    matrices = [tensors[name] for name in sorted(names) if tensors[name].dim() == 2]
    return min((len(matrix) for matrix in matrices), default=0)


def trained_in(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The modules of the head that an adapter's file has other values for than the base."""
    found: dict[str, None] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.").removeprefix("model.")
        root = name.partition(".")[0]
        if root in head_modules(graph) and name in graph.values:
            own = graph.values[name]
            if own.shape != tensor.shape or not torch.equal(tensor.to(own.dtype), own):
                found[root] = None
    return list(found)


def relabelled(graph: Graph, labels: tuple[str, ...], seed: int = 0) -> Graph:
    """A graph whose classes have these names, the methods applied again.

    What the methods have learned stays, and so does a head of the same size; one of another size begins anew.
    """
    from surgeon import run
    from surgeon.source import open_graph, open_source

    source = open_source(graph.source, graph.task, labels=labels, context=graph.context)
    result = run.apply(open_graph(source, seed=seed), *graph.applied, seed=seed)
    same_size = len(labels) == graph.config.num_labels
    heads = tuple(f"{path}." for path in head_modules(graph))
    for name, value in graph.inserted.items():
        fits = name in result.tensors and result.tensors[name].shape == graph.tensors[name].shape
        if fits and (same_size or not name.startswith(heads or ("\0",))):
            result.inserted[name] = value
    return dataclasses.replace(result, applied=graph.applied)
