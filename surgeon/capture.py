"""From a Hugging Face model to a `Graph`, once, from structure alone.

The model is built on the meta device in bf16 (see `surgeon.cleanup` for why), its attentions are routed through
transformers' own attention interface to the one `surgeon::attention` operator, equal layers are traced once (see
`surgeon.layers`), and `torch.export` does the rest. Weights are not touched.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import fx, nn

from surgeon import cleanup, interface, ops
from surgeon.errors import SurgeonError, UnsupportedError
from surgeon.graph import Graph, TensorSpec, copied, sweep
from surgeon.layers import LayerTracer, Retrace
from surgeon.split import Split, split
from surgeon.tasks import TASKS, Task, find_task
from surgeon.tracing import literals, quiet, silence_noise

assert ops  # registers the operators
_BATCH, _LENGTH = 2, 5


@dataclass(frozen=True)
class Trace:
    """A traced model before it is cut into layers."""

    graph: fx.Graph
    followers: dict[str, list[str]]
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    constants: dict[str, torch.Tensor]


def build(config: transformers.PretrainedConfig, task: Task, attention: str) -> transformers.PreTrainedModel:
    """The model on the meta device, in the dtype of the trace, with every attention routed to `attention`."""
    auto = getattr(transformers, task.auto_class)
    with torch.device("meta"):
        model: transformers.PreTrainedModel = auto.from_config(
            copy.deepcopy(config),
            attn_implementation=attention,
            experts_implementation=interface.NAME,
            dtype=cleanup.TRACE_DTYPE,
        )
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
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
    for attention in ("surgeon", "sdpa", "eager"):
        with quiet(), contextlib.suppress(_NotThisWay):
            model, trace, cut = _traced(config, kind, attention, share_layers, reasons)
            notes = trace.notes if attention == "surgeon" else (*trace.notes, f"attention captured as {attention}")
            graph = _graph(model, kind, trace, cut, notes, reasons if attention != "surgeon" else [])
            graph.config = config
            return graph
    raise UnsupportedError(
        f"cannot capture {config.model_type} for {kind.name}: {reasons[0]}",
        type(config).__name__,
        f"the tasks are {', '.join(TASKS)}; `surgeon doctor` checks this installation",
    )


class _NotThisWay(Exception):
    """This attention implementation cannot be traced; try the next."""


def _traced(
    config: transformers.PretrainedConfig, task: Task, attention: str, share: bool, reasons: list[str]
) -> tuple[transformers.PreTrainedModel, Trace, Split]:
    private: set[str] = set()
    try:
        while True:
            model = build(config, task, attention)
            before = len(private)
            try:
                trace = _export(model, task, share, private)
                return model, trace, split(trace.graph, trace.followers)
            except Retrace:
                if len(private) == before:
                    share = False
    except SurgeonError as error:
        reasons.append(error.what)
    except Exception as error:  # torch.export raises every kind of exception for what it cannot trace
        reasons.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
    raise _NotThisWay


def example_inputs(model: nn.Module, task: Task) -> dict[str, torch.Tensor]:
    """Meta inputs of two rows and five tokens for every tensor input surgeon feeds; encoders get seven tokens."""
    accepted = inspect.signature(model.forward).parameters
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False)) and task.name != "token-classification"

    def ids(length: int) -> torch.Tensor:
        return torch.zeros(_BATCH, length, dtype=torch.long, device="meta")

    inputs = {"input_ids": ids(_LENGTH + 2 if seq2seq else _LENGTH)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if seq2seq and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = ids(_LENGTH)
        if "decoder_attention_mask" in accepted:
            inputs["decoder_attention_mask"] = torch.ones_like(inputs["decoder_input_ids"])
    else:
        for name in ("position_ids", "token_type_ids"):
            if name in accepted and (name == "position_ids" or getattr(model.config, "type_vocab_size", 0)):
                inputs[name] = ids(_LENGTH)
    return {name: value for name, value in inputs.items() if name in accepted}


def _export(model: transformers.PreTrainedModel, task: Task, share: bool, private: set[str]) -> Trace:
    inputs = example_inputs(model, task)
    names: list[str] = []
    notes = silence_noise(model)
    forward = model.forward
    extra = {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}

    def traced(**kwargs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = forward(**kwargs, **extra, return_dict=True)
        names[:] = [name for name in task.outputs if isinstance(result.get(name), torch.Tensor)]
        return tuple(result[name] for name in names)

    model.__dict__["forward"] = traced
    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    traced.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    with interface.recording() as record, LayerTracer(model, share=share, private=private) as tracer, torch.no_grad(), literals():
        program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False)
    for kind in tracer.kinds.values():
        if kind.followers and any(index.read for index in kind.indices):
            private.add(kind.shape)
            raise Retrace
    record.check()
    missing = [name for name in task.required if name not in names]
    if missing:
        raise UnsupportedError(f"the model returns no {missing[0]}", type(model).__name__)
    followers = {kind.path: kind.followers for kind in tracer.kinds.values()}
    graph, constants = _lifted(program)
    cleanup.clean(graph)
    return Trace(graph, followers, tuple(names), tuple([*notes, *record.notes]), constants)


def _lifted(program: torch.export.ExportedProgram) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """The program's graph with parameters as attributes, module paths in `meta["path"]`, and its constants."""
    module = program.module(check_guards=False)
    graph, _ = copied(module.graph)
    constants = {
        str(node.target): _attribute(module, str(node.target))
        for node in graph.nodes
        if node.op == "get_attr" and str(node.target).rpartition(".")[2].startswith("lifted_tensor")
    }
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["path"] = _dotted(list(stack.values())[-1][0]) if stack else ""
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = _attribute(module, str(node.target))
    output = next(iter(reversed(graph.nodes)))
    output.args = (tuple(torch.utils._pytree.tree_leaves(output.args[0])),)
    return graph, constants


def _dotted(path: str) -> str:
    if path.startswith("_empty_nn_module_stack"):
        return ""
    return path.removeprefix("L['self'].").removeprefix("L['self']").replace("[", ".").replace("]", "").replace("'", "")


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _graph(
    model: transformers.PreTrainedModel, task: Task, trace: Trace, cut: Split, notes: tuple[str, ...], why: list[str]
) -> Graph:
    """The `Graph` of a cut trace: every tensor of the model with its place, and the ties between them."""
    tensors: dict[str, TensorSpec] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
            continue
        first[id(parameter)] = name
        dtype = None if parameter.dtype == cleanup.TRACE_DTYPE else parameter.dtype
        tensors[name] = TensorSpec(tuple(parameter.shape), dtype)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        stored = leaf not in model.get_submodule(owner)._non_persistent_buffers_set
        dtype = None if buffer.dtype == cleanup.TRACE_DTYPE else buffer.dtype
        tensors[name] = TensorSpec(tuple(buffer.shape), dtype, persistent=stored, parameter=False)
    _read_own_names(cut.trunk, ties)
    graph = Graph(
        config=model.config, task=task.name, trunk=cut.trunk, layers=cut.layers, tensors=tensors, values={}, ties=ties,
        outputs=trace.outputs, notes=(*notes, *why),
    )  # fmt: skip
    _add_constants(graph, trace.constants)
    return graph


def _add_constants(graph: Graph, constants: dict[str, torch.Tensor]) -> None:
    """Register the tensors that the model's code makes from data; layers that share a graph share their values."""
    for part, prefixes in graph.parts():
        for node in part.nodes:
            full = prefixes[0] + str(node.target)
            if node.op != "get_attr" or full not in constants:
                continue
            for prefix in prefixes:
                name, value = prefix + str(node.target), constants[full]
                graph.tensors[name] = TensorSpec(tuple(value.shape), value.dtype, persistent=False, parameter=False)
                graph.inserted[name] = lambda value=value: value.detach().clone()  # type: ignore[misc]


def _read_own_names(trunk: fx.Graph, ties: dict[str, str]) -> None:
    """Give every reader of a tied weight its own name for it; `torch.export` keeps one name for all."""
    names = {*ties, *ties.values()}
    for node in [n for n in trunk.nodes if n.op == "get_attr" and n.target in names]:
        for user in list(node.users):
            own = f"{user.meta.get('path', '')}.weight"
            if own in names and own != node.target:
                with trunk.inserting_before(user):
                    fresh = trunk.get_attr(own)
                fresh.meta = dict(node.meta)
                user.replace_input_with(node, fresh)
    sweep(trunk)
