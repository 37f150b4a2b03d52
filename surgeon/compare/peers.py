"""A method through PEFT: its own model with the config and the first values of surgeon's adapter."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from surgeon import store
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.hook import Hook
from surgeon.passes import find_peft
from surgeon.passes.base import Adapter, Pass
from surgeon.passes.nf4 import Nf4
from surgeon.peft_files import CONFIG, WEIGHTS, read_config, read_tensors
from surgeon.tasks import TASKS

if TYPE_CHECKING:
    import peft

_FIRST_TOTAL = 10_000
"""The steps that the config of an AdaLoRA which was not trained speaks of."""


def why_not(graph: Graph) -> str:
    """Why PEFT is not asked for what is applied to a graph, or ""."""
    try:
        import peft  # noqa: F401
    except ImportError:
        return "peft is not installed"
    below, adapters = _parted(graph)
    if any(not isinstance(step, Nf4) for step in below):
        return "PEFT has it over GPTQModel's checkpoints alone"
    if below and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if len(adapters) != 1:
        return "PEFT has no such method"
    return ""


def _parted(graph: Graph) -> tuple[list[Pass], list[Pass]]:
    """The passes that hold weights in codes, and the others."""
    parts: tuple[list[Pass], list[Pass]] = ([], [])
    for step in graph.applied:
        parts[not step.derived].append(step)
    return parts


def build(graph: Graph, folder: Path, steps: int) -> tuple[nn.Module, list[Hook]]:
    """PEFT's model of an applied adapter, ready to train, and what its users call around a step.

    Args:
        graph: with one adapter, as it is first; over NF4 weights PEFT's is over those of bitsandbytes.
        folder: an empty place for its files.
        steps: of the run.

    Raises:
        UnsupportedError: PEFT has no such method.
    """
    import peft
    import transformers

    store.save(graph, folder / "first")
    if not (folder / "first" / CONFIG).is_file():
        raise UnsupportedError("PEFT has no form for it", graph.applied[0].name, "compare it without --peers")
    config = peft.PeftConfig.from_pretrained(str(folder / "first"))
    config.inference_mode = False
    _check_same(graph, read_config(folder / "first"))
    if isinstance(config, peft.AdaLoraConfig):
        _schedule(config, steps)
    loader = getattr(transformers, TASKS[graph.task].auto_class)
    labels = {"num_labels": graph.config.num_labels} if graph.labels else {}
    base = loader.from_pretrained(graph.source, dtype=torch.float32, **_quantised(graph), **labels)
    model = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(model, read_tensors(folder / "first" / WEIGHTS))
    return model, [_Allocate()] if isinstance(config, peft.AdaLoraConfig) else []


def _quantised(graph: Graph) -> dict[str, Any]:
    """What transformers is told of the codes that a base has."""
    import transformers

    for step in _parted(graph)[0]:
        if isinstance(step, Nf4):
            options = {"bnb_4bit_quant_type": step.kind, "bnb_4bit_use_double_quant": step.double}
            options["bnb_4bit_compute_dtype"] = torch.float32
            return {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True, **options)}
    return {}


def _check_same(graph: Graph, config: dict[str, Any]) -> None:
    """Raise UnsupportedError where PEFT's files hold what a method computes, and PEFT does not train it so (DyLoRA)."""
    step = _parted(graph)[1][0]
    kind = find_peft(config)
    own = isinstance(step, Adapter) and bool(step.hooks(graph, step.name, 0))
    if not isinstance(step, kind) or (own and type(step) is not kind):
        raise UnsupportedError("PEFT has no such method", step.name, "compare it without --peers")


def _schedule(config: peft.AdaLoraConfig, steps: int) -> None:
    config.total_step = steps
    config.tinit, config.tfinal = (round(value * steps / _FIRST_TOTAL) for value in (config.tinit, config.tfinal))


class _Allocate(Hook):
    """PEFT's AdaLoRA is told of every step by its user."""

    def after_step(self, model: Any, optimizer: torch.optim.Optimizer, step: int, total: int) -> None:
        """Let it move its ranks."""
        model.base_model.update_and_allocate(step + 1)


class OfTokens(nn.Module):
    """A model with the logits of the tokens alone: PEFT's prompts have logits too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        """As the model's."""
        output = self.model(input_ids=input_ids, **inputs)
        if getattr(self.model, "peft_type", None) == "PROMPT_TUNING" and output.logits.dim() == 3:
            output.logits = output.logits[:, -input_ids.shape[1] :]
        return output
