"""From a Hugging Face model to a `Graph`, once, from structure alone.

The model is built on the meta device in bf16 (see `surgeon.cleanup` for why), its attentions are routed through
transformers' own attention interface to the one `surgeon::attention` operator, equal layers are traced once (see
`surgeon.layers`), and `torch.export` does the rest. Weights are not touched.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from surgeon import cleanup, interface, ops
from surgeon.buffers import transient
from surgeon.errors import SurgeonError, UnsupportedError
from surgeon.graph import Graph
from surgeon.layers import LayerTracer, Retrace
from surgeon.program import FIXED_LENGTH, LOOPS, NOISY, Trace, assemble, check_lengths, check_noise, lifted, reason
from surgeon.recognise import recognise
from surgeon.recognise_values import Buffers
from surgeon.remote_code import is_trusted
from surgeon.split import split
from surgeon.tasks import TASKS, Task, find_task
from surgeon.tracing import literals, quiet, silence_noise

assert ops  # registers the operators
_MIXED = "expected scalar type"  # torch's words for a product of two dtypes
_BATCH, _CHOICES = 2, 3
# Their code for multiple choice takes positions and does not flatten them, as it does all else.
_COUNT_THEMSELVES = ("distilbert",)
# Models that work in chunks of tokens need more than one chunk before their arithmetic shows for any length.
_LENGTHS = (5, 67, 1031)


def build(
    config: transformers.PretrainedConfig, task: Task, attention: str, *, uniform: bool = False
) -> transformers.PreTrainedModel:
    """The model on the meta device, in the dtype of the trace, with every attention routed to `attention`.

    `uniform` also casts parameters that the model's code makes in fp32, as loading its checkpoint does.
    """
    auto = getattr(transformers, task.auto_class)
    with torch.device("meta"):
        model: transformers.PreTrainedModel = auto.from_config(
            copy.deepcopy(config),
            attn_implementation=attention,
            experts_implementation=interface.NAME,
            dtype=cleanup.TRACE_DTYPE,
            trust_remote_code=is_trusted(),
        )
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if uniform and parameter.is_floating_point():
            parameter.data = parameter.data.to(cleanup.TRACE_DTYPE)
    return model


def capture_config(
    config: transformers.PretrainedConfig, task: str | Task | None = None, *, share_layers: bool = True
) -> Graph:
    """Capture the model a config describes; the graph has no values.

    Args:
        config: a Hugging Face config.
        task: see `surgeon.tasks`; read off the config's architecture if not given.
        share_layers: trace equal layers once. Without, every layer is traced: the same graph, slower.

    Raises:
        UnsupportedError: `torch.export` cannot trace this model; the message carries its reason.
    """
    kind = task if isinstance(task, Task) else find_task(task, config.architectures, config.model_type)
    reasons: list[str] = []
    choices = (("surgeon", "sdpa", "eager"), _LENGTHS, (True, False), (False, True))
    for way in itertools.starmap(_Way, itertools.product(*choices)):
        if not way.answers(reasons[-1] if reasons else ""):
            continue
        attention = way.attention
        with quiet(), contextlib.suppress(_NotThisWay):
            model, trace = _traced(config, kind, way, share_layers, reasons)
            graph = assemble(model, config, kind.name, trace, list(trace.notes))
            return graph if trace.attentions else _with_attention(graph, transient(model), attention, reasons)
    raise UnsupportedError(
        f"cannot capture {config.model_type} for {kind.name}: {reasons[0]}",
        type(config).__name__,
        f"the tasks are {', '.join(TASKS)}; `surgeon doctor` checks this installation",
    )


def _with_attention(graph: Graph, buffers: Buffers, attention: str, reasons: list[str]) -> Graph:
    """A graph of an architecture with attention code of its own, with that code as nodes or with a note why not."""
    found, why = recognise(graph, buffers)
    code = "own" if attention == interface.NAME else attention
    if not why:
        return dataclasses.replace(found, notes=(*graph.notes, f"attention recognised in its {code} code"))
    refused = f"attention captured as it is, in its {code} code: {why}"
    return dataclasses.replace(graph, notes=(*graph.notes, refused, *dict.fromkeys(reasons)))


@dataclass(frozen=True)
class _Way:
    """One way to trace: attention implementation, tokens of the example, training mode, and `build`'s uniform dtype."""

    attention: str
    length: int
    training: bool
    uniform: bool

    def answers(self, why: str) -> bool:
        """Whether to try this way after the one before it failed with `why`."""
        longer, quieter = self.length != _LENGTHS[0], not self.training
        if why.startswith(LOOPS):
            return False
        cast = not self.uniform or _MIXED in why
        return cast and (not longer or why.startswith(FIXED_LENGTH)) and (not quieter or why.startswith(NOISY))


class _NotThisWay(Exception):
    """It cannot be traced this way; try the next."""


def _traced(
    config: transformers.PretrainedConfig, task: Task, way: _Way, share: bool, reasons: list[str]
) -> tuple[transformers.PreTrainedModel, Trace]:
    private: set[str] = set()
    try:
        while True:
            model = build(config, task, way.attention, uniform=way.uniform)
            before = len(private)
            try:
                return model, _export(model, task, way, share, private)
            except Retrace:
                if not share:
                    raise UnsupportedError("a layer reads what another computed, besides what it is given") from None
                share = len(private) > before
    except SurgeonError as error:
        reasons.append(error.what)
    except Exception as error:  # torch.export raises every kind of exception for what it cannot trace
        reasons.append(reason(error))
    raise _NotThisWay


def example_inputs(model: nn.Module, task: Task, length: int = _LENGTHS[0]) -> dict[str, torch.Tensor]:
    """Meta inputs of two rows of `length` tokens for every tensor input surgeon feeds; encoders get two tokens more.

    Multiple choice has rows of three choices, `[2, 3, length]`.
    """
    accepted = inspect.signature(model.forward).parameters
    # Classifiers make the decoder's ids themselves, from the encoder's.
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False)) and "classification" not in task.name

    def ids(columns: int) -> torch.Tensor:
        shape = (_BATCH, _CHOICES, columns) if task.name == "multiple-choice" else (_BATCH, columns)
        return torch.zeros(shape, dtype=torch.long, device="meta")

    inputs = {"input_ids": ids(length + 2 if seq2seq else length)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if seq2seq and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids(length)
        if "decoder_attention_mask" in accepted:
            inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    else:
        for name in ("position_ids", "token_type_ids"):
            typed = bool(getattr(model.config, "type_vocab_size", None))
            counts = task.name == "multiple-choice" and getattr(model.config, "model_type", "") in _COUNT_THEMSELVES
            if name in accepted and (typed if name == "token_type_ids" else not counts):
                inputs[name] = ids(length)
    return {name: value for name, value in inputs.items() if name in accepted}


def _export(model: transformers.PreTrainedModel, task: Task, way: _Way, share: bool, private: set[str]) -> Trace:
    inputs = example_inputs(model, task, way.length)
    names: list[str] = []
    notes = silence_noise(model, way.training)
    forward = model.forward
    extra = {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}

    def traced(**kwargs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = forward(**kwargs, **extra, return_dict=True)
        names[:] = [name for name in task.outputs if isinstance(result.get(name), torch.Tensor)]
        return tuple(result[name] for name in names)

    model.__dict__["forward"] = traced
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    traced.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    dynamic = {name: dict.fromkeys(range(x.dim()), torch.export.Dim.DYNAMIC) for name, x in inputs.items()}
    tracer = LayerTracer(model, share=share, private=private)
    with interface.recording() as record, tracer, torch.no_grad(), literals():
        program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False)
    check_noise(program)
    check_lengths(program, inputs, model.config)
    for kind in tracer.kinds.values():
        if kind.followers and any(index.read for index in kind.indices):
            private.add(kind.shape)
            raise Retrace
    record.check()
    missing = [name for name in task.required if name not in names]
    if missing:
        raise UnsupportedError(f"the model returns no {missing[0]}", type(model).__name__)
    graph, constants = lifted(program)
    cleanup.clean(graph)
    cut = split(graph, {kind.path: kind.followers for kind in tracer.kinds.values()}, tracer.runs)
    attentions = sum(node.target is torch.ops.surgeon.attention.default for node in graph.nodes)
    return Trace(cut, tuple(names), (*notes, *record.notes), constants, attentions)
