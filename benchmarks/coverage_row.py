"""One row of the coverage table: what works for one architecture or checkpoint, or the exact reason why not."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.zoo import popular
from benchmarks.zoo.build import build, tokens
from benchmarks.zoo.causal import causal_config
from benchmarks.zoo.overrides import CANNOT
from surgeon import module, run
from surgeon.capture import capture_config
from surgeon.fold import fold
from surgeon.graph import Graph
from surgeon.passes import make
from surgeon.sites import ATTENTION, CONV1D, LINEAR, sites

BOUND = 1e-5
_SHAPES = ((2, 6, 0), (3, 11, 3))


@dataclass
class Row:
    """Outcomes of one model; an empty string means "not reached".

    Attributes:
        name: architecture or checkpoint.
        captured: largest error of the logits over the largest logit, at two shapes, one left-padded.
        attention: attention nodes of attention modules.
        applied: LoRA sites with `all-linear`, of all linears.
        trained: loss of one step; every adapter parameter has a finite gradient.
        merged: largest error of the merged weights' logits over the largest logit.
        exported: likewise for ONNX in onnxruntime.
        seconds: of the capture alone.
        reason: why the next step failed, or how attention was captured.
    """

    name: str
    captured: str = ""
    attention: str = ""
    applied: str = ""
    trained: str = ""
    merged: str = ""
    exported: str = ""
    seconds: float = 0.0
    reason: str = ""


def config_of(name: str) -> PretrainedConfig:
    """The tiny config of an architecture, or a popular checkpoint's own fields shrunk in size."""
    return popular.shrunk(name) if name in popular.NAMES else causal_config(name)


def row(name: str, exporter: Callable[[Graph], float] | None = None) -> Row:
    """Every step in order, stopping at the first that fails."""
    result = Row(name)
    if name in CANNOT:
        result.reason = CANNOT[name]
        return result
    try:
        _steps(result, exporter)
    except Exception as error:  # the row says why, the table goes on
        result.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return result


def _steps(result: Row, exporter: Callable[[Graph], float] | None) -> None:
    config = config_of(result.name)
    start = time.perf_counter()
    graph = capture_config(copy.deepcopy(config), "causal-lm")
    result.seconds = round(time.perf_counter() - start, 2)
    result.reason = "; ".join(dict.fromkeys(note[:160] for note in graph.notes))
    model = build(config)
    graph.values = _values(model)
    result.attention = f"{len(sites(graph, ATTENTION))} of {_attentions(model)}"
    error = max(_error(_eager(model, graph, batch), _logits(graph, batch), batch) for batch in _batches(graph, config))
    if error > BOUND:
        raise ValueError(f"logits differ by {error:.1e}")
    result.captured = f"{error:.0e}"
    adapted = run.apply(graph, make("lora", targets="all-linear", rank=1))
    result.applied = f"{len(_adapted(adapted))} of {len(sites(graph, LINEAR, CONV1D))}"
    loss, without = _train(adapted, _batches(graph, config)[1], model)
    result.trained = f"{loss:.2f}"
    if without:
        result.reason += f"; as in transformers, no gradient reaches {len(without)} linears, e.g. {without[0]}"
    result.merged = _merge(adapted, _batches(graph, config)[1])
    if exporter is not None:
        result.exported = f"{exporter(graph):.0e}"


def _values(model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


def _attentions(model: PreTrainedModel) -> int:
    """Modules named attention that hold no other such module and have weights."""
    found = [(p, m) for p, m in model.named_modules() if re.search(r"(Self|Cross)?Attention$|Attn$", type(m).__name__)]
    outer = {path.rpartition(".")[0] for path, _ in found}
    return sum(path not in outer and any(True for _ in m.parameters()) for path, m in found)


def _batches(graph: Graph, config: PretrainedConfig) -> list[dict[str, torch.Tensor]]:
    """The graph's inputs at two shapes, in its order."""
    batches = []
    for rows, length, padding in _SHAPES:
        known = tokens(config, rows, length, padding=padding)
        known["position_ids"] = torch.arange(length).expand(rows, -1)
        known["token_type_ids"] = torch.zeros_like(known["input_ids"])
        batches.append({name: known[name] for name in graph.inputs})
    return batches


def _eager(model: PreTrainedModel, graph: Graph, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        try:
            return model(**batch, use_cache=False).logits
        except TypeError:
            return model(**batch).logits


def _logits(graph: Graph, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return module.load(graph)(*batch.values())[0]


def _error(theirs: torch.Tensor, ours: torch.Tensor, batch: dict[str, torch.Tensor]) -> float:
    seen = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    return float((theirs - ours)[seen].abs().max() / theirs[seen].abs().max())


def _adapted(graph: Graph) -> list[str]:
    return [name for name in graph.trainable() if name.endswith(".lora.a")]


def _randomised(graph: Graph) -> Graph:
    """Adapters that change the model: b drawn like a."""
    inserted = dict(graph.inserted)
    for number, (name, spec) in enumerate(graph.trainable().items()):
        inserted[name] = functools.partial(_drawn, spec.shape, number)
    return dataclasses.replace(graph, inserted=inserted)


def _drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def _train(graph: Graph, batch: dict[str, torch.Tensor], theirs: PreTrainedModel) -> tuple[float, list[str]]:
    """The loss of one step, and the sites that no gradient reaches because none reaches transformers' own weight."""
    model = module.load(_randomised(graph)).train()
    loss = _loss(model(*batch.values())[0], batch)
    loss.backward()
    adapters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bad = [name for name, p in adapters if p.grad is None or not p.grad.isfinite().all()]
    unreached = _unreached(theirs, batch) if bad else set()
    without = sorted({name.rpartition(".lora.")[0] for name in bad})
    for site in without:
        if f"{site}.weight" not in unreached:
            raise ValueError(f"the adapter of {site} has no finite gradient")
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    return float(loss), without


def _loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())


def _unreached(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> set[str]:
    model.train()
    _loss(model(**batch).logits, batch).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


def _merge(graph: Graph, batch: dict[str, torch.Tensor]) -> str:
    adapted = _randomised(graph)
    error = _error(_logits(adapted, batch), _logits(fold(adapted), batch), batch)
    if error > 10 * BOUND:
        raise ValueError(f"merged logits differ by {error:.1e}")
    return f"{error:.0e}"


def as_dict(result: Row) -> dict[str, Any]:
    """For the cache."""
    return dataclasses.asdict(result)
