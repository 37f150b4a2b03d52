"""What `torch.export` returns, checked for fixed lengths and made into a `Graph`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import fx, nn

from surgeon import cleanup
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph, TensorSpec, copied, sweep
from surgeon.split import Split

FIXED_LENGTH = "the trace holds only for some lengths"
NOISY = "training draws random numbers besides dropout"
LOOPS = "its code fixes the length: it loops over tokens, or computes with their number"
_POSITIONS = ("max_position_embeddings", "max_seq_len")
_GROWTH = (1, 2, 3, 7, 40)


@dataclass(frozen=True)
class Trace:
    """A traced model, cut into layers.

    Attributes:
        cut: trunk and layers.
        outputs: names of the trunk's outputs.
        notes: what was found worth telling.
        constants: full name → tensors that the model's code makes from data.
        attentions: number of attention nodes that were traced.
    """

    cut: Split
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    constants: dict[str, torch.Tensor]
    attentions: int


def reason(error: Exception) -> str:
    """The first line of what `torch.export` or the model's own code raised."""
    lines = str(error).strip().splitlines() or [""]
    return LOOPS if lines[0].startswith("Constraints violated") else f"{type(error).__name__}: {lines[0]}"


def check_lengths(
    program: torch.export.ExportedProgram, inputs: dict[str, torch.Tensor], config: transformers.PretrainedConfig
) -> None:
    """Evaluate what `torch.export` assumed about sizes at larger batches and lengths than those traced.

    No length is tried for which the model has no positions.

    Raises:
        UnsupportedError: an assumption fails, so the graph would compute something else for other lengths.
    """
    code: list[str] = getattr(program, "_guards_code", None) or []
    scope = {"math": math, "torch": torch, "max": max, "min": min}
    # At the last positions slices of a table become the table itself, which is no different arithmetic.
    text = config.get_text_config()
    longest = min(getattr(text, name, None) or 10**6 for name in _POSITIONS) - 2
    if longest <= max(x.shape[-1] for x in inputs.values()):
        raise UnsupportedError(f"{FIXED_LENGTH}, and the model has {longest + 2} positions")
    for step in _GROWTH:
        sizes = {name: _grown(x, step, longest) for name, x in inputs.items()}
        for guard in code:
            if not eval(guard, scope, {"L": sizes}):
                raise UnsupportedError(f"{FIXED_LENGTH}: {guard[:120]}")


def check_noise(program: torch.export.ExportedProgram) -> None:
    """Raise UnsupportedError if anything but dropout is random: evaluation would then be another function."""
    for node in program.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags and not any(
            w in str(node.target) for w in ("dropout", "attention")
        ):
            raise UnsupportedError(f"{NOISY}: {node.target}")


def _grown(x: torch.Tensor, step: int, longest: int) -> torch.Tensor:
    *rows, length = x.shape
    return x.new_empty(*(count + step - 1 for count in rows), max(length, min(length * step + step - 1, longest)))


def lifted(program: torch.export.ExportedProgram) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
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


def assemble(
    model: transformers.PreTrainedModel,
    config: transformers.PretrainedConfig,
    task: str,
    trace: Trace,
    notes: list[str],
) -> Graph:
    """The `Graph` of a trace: every tensor of the model with its place, and the ties between them."""
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
    _read_own_names(trace.cut.trunk, ties)
    graph = Graph(
        config=config, task=task, trunk=trace.cut.trunk, layers=trace.cut.layers, tensors=tensors, values={}, ties=ties,
        outputs=trace.outputs, notes=tuple(notes),
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
            own = f"{user.meta.get('path', '')}.{str(node.target).rpartition('.')[2]}"
            if own in names and own != node.target:
                with trunk.inserting_before(user):
                    fresh = trunk.get_attr(own)
                fresh.meta = dict(node.meta)
                user.replace_input_with(node, fresh)
    sweep(trunk)
