"""From a graph to an ONNX model in memory: every distinct layer lowered once, tensors read when the file is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from surgeon.errors import UnsupportedError
from surgeon.graph import Graph, val
from surgeon.halves import STATES
from surgeon.lower.onnx import opset_23, slots
from surgeon.lower.onnx.adapter_file import IDS, is_slot
from surgeon.lower.onnx.codes import Form, prepared
from surgeon.lower.onnx.fused import fuse, join_sums
from surgeon.lower.onnx.join import WIDE, Joined, Shape, finish, typed
from surgeon.lower.onnx.norms import norm
from surgeon.lower.onnx.packed import packed
from surgeon.lower.onnx.parts import META, SIZES, Part, Shapes, input_name, lower_part, lowered, segments, turnable
from surgeon.lower.onnx.profiles import BLOCKS, DEFAULT, FUSED, GQA, PROFILES, Profile
from surgeon.lower.onnx.scalars import unshare
from surgeon.module import read_tensor
from surgeon.wiring import inputs_of

BATCH, NEW, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
CHOICES, LONGER = "choices", "output_length"
SOURCE, HELD = "encoder_sequence_length", "past_encoder_sequence_length"
_NORMS = {GQA: norm, FUSED: opset_23.norm}


def build(
    graph: Graph,
    dtype: torch.dtype,
    four_bit: str = "standard",
    profile: Profile = PROFILES[DEFAULT],
    *,
    turn: bool = True,
    level: int = 1,
) -> ir.Model:
    """The ONNX model of a graph: a causal language model with K/V cache, or a model that is run once.

    Args:
        graph: a graph with values, without adapters.
        dtype: fp32 or fp16, of the weights and the arithmetic; what the graph does in fp32 stays so.
        four_bit: see `surgeon.lower.onnx.export.export_onnx`.
        profile: what it is made for.
        turn: store the weights of linears `[in, out]`; without, `[out, in]`, as checkpoints hold them.
        level: of the accuracy of MatMulNBits, see `surgeon.lower.onnx.codes.Form`.

    Raises:
        UnsupportedError: a part of the graph has no ONNX form.
    """
    norms = _NORMS.get(profile.attention) if dtype == torch.float32 else None
    form = Form(four_bit, level, profile.integers == BLOCKS, norms)
    graph = prepared(packed(graph), form)
    turned = turnable(graph) if turn else set()
    trunk = lowered(graph.trunk, [""], turned, graph, dtype, form)
    layers = {
        id(part): lowered(part, [f"{path}." for path in paths], turned, graph, dtype, form)
        for part, paths in graph.groups()
    }
    runs = tuple(_run(graph, trunk, layers, turned, dtype, sizes) for sizes in SIZES)
    models = {}
    for part, paths in graph.groups():
        first, second = (run.given[id(part)] for run in runs)
        models[id(part)] = _lower(layers[id(part)].graph, first, second, paths[0], profile.opset)
    joined = Joined(lambda name: _stored(graph, name, turned, dtype))
    inputs = [typed(name, kind, shape) for name, shape, kind in _interface(graph, dtype)]
    results = _join(graph, joined, trunk, runs, inputs, lambda path: _layer(graph, models, layers, path), profile.opset)
    model = finish(joined, inputs, results, _outputs(graph, trunk, runs), profile.opset)
    if profile.contrib:
        fuse(model)
    if form.norms is norm:
        join_sums(model, joined.sums)
    if profile.package == "openvino":
        unshare(model)
    return model


def _layer(graph: Graph, models: dict[int, ir.Model], layers: dict[int, Part], path: str) -> tuple[ir.Model, list[str]]:
    key = id(graph.layers[path])
    return models[key], [graph.resolve(f"{path}.{name}") for name in layers[key].tensors]


def _join(
    graph: Graph,
    joined: Joined,
    trunk: Part,
    runs: tuple[Shapes, ...],
    inputs: Sequence[ir.Value],
    layer: Callable[[str], tuple[ir.Model, list[str]]],
    opset: int,
) -> list[ir.Value]:
    """Stamp the trunk's segments and the layers in turn; returns the values of the trunk's outputs."""
    first, second = (run.env for run in runs)
    numbers = {n: v for n, v in first.items() if isinstance(v, int) and second[n] == v}
    given = [*inputs, *(joined.tensor(graph.resolve(name)) for name in trunk.tensors)]
    placeholders = [node for node in trunk.graph.nodes if node.op == "placeholder"]
    values: dict[fx.Node, ir.Value] = dict(zip(placeholders, given, strict=True))
    pieces = segments(trunk.graph, numbers)

    def segment(number: int) -> None:
        if (piece := pieces.get(number)) is None:
            return
        one, two = (tuple(run[node] for node in piece.inputs) for run in (first, second))
        model = _lower(piece.graph, one, two, "the trunk", opset)
        made = joined.stamp(model, f"trunk_{number}/", {i: values[node] for i, node in enumerate(piece.inputs)})
        values.update(zip(piece.outputs, made, strict=True))

    segment(0)
    calls = [node for node in trunk.graph.nodes if node.op == "call_module"]
    for number, call in enumerate(calls, start=1):
        model, tensors = layer(str(call.target))
        args = {i: values[n] for i, n in enumerate(call.args) if isinstance(n, fx.Node) and n not in numbers}
        args.update({i: joined.tensor(name) for i, name in enumerate(tensors, start=len(call.args))})
        made = joined.stamp(model, f"{call.target}/", args)
        values.update({user: made[int(str(user.args[1]))] for user in call.users})
        segment(number)
    return [values[node] for node in _results(trunk)]


def _results(trunk: Part) -> list[fx.Node]:
    output: Any = next(iter(reversed(trunk.graph.nodes)))
    return list(output.args[0])


def _run(
    graph: Graph, trunk: Part, layers: dict[int, Part], turned: set[str], dtype: torch.dtype, sizes: dict[str, int]
) -> Shapes:
    def tensors(part: Part, prefix: str) -> list[torch.Tensor]:
        found = []
        for name in part.tensors:
            shape, kind = _described(graph, graph.resolve(prefix + name), turned, dtype)
            found.append(torch.empty(shape, dtype=WIDE.get(kind, kind), device=META))
        return found

    shapes = Shapes(graph, trunk, layers, tensors)
    given = [torch.empty(_sized(shape, sizes), dtype=kind, device=META) for _, shape, kind in _interface(graph, dtype)]
    shapes.run(*given, *tensors(trunk, ""))
    return shapes


def _lower(part: fx.Graph, first: tuple[Any, ...], second: tuple[Any, ...], where: str, opset: int) -> ir.Model:
    try:
        return lower_part(part, first, second, opset)
    except UnsupportedError as error:
        raise UnsupportedError(error.what, where, error.hint) from error


def _interface(graph: Graph, dtype: torch.dtype) -> list[tuple[str, Shape, torch.dtype]]:
    """Name, shape and dtype of every input of the model."""
    cached = any(name.startswith("past_key_values.") for name in graph.inputs)
    found: list[tuple[str, Shape, torch.dtype]] = []
    for node in graph.trunk.nodes:
        if node.op != "placeholder":
            continue
        name = input_name(node)
        rows = (BATCH, CHOICES) if graph.task == "multiple-choice" else (BATCH,)
        if name in ("input_ids", "position_ids", "token_type_ids"):
            found.append((name, (*rows, NEW), torch.int64))
        elif name == "attention_mask":
            found.append((name, (*rows, TOTAL if cached else NEW), torch.int64))
        elif name == "encoder_attention_mask":
            found.append((name, (BATCH, SOURCE), torch.int64))
        elif name == STATES:
            found.append((name, (BATCH, _states_length(graph), int(val(node).shape[2])), dtype))
        elif name.startswith("past_key_values."):
            _, heads, _, size = val(node).shape
            found.append((name, (BATCH, int(heads), HELD if ".encoder." in name else PAST, int(size)), dtype))
        elif is_slot(name):
            kind = torch.int64 if name == IDS else dtype
            found.append((name, slots.shape_of(name, val(node)), kind))
        else:
            raise UnsupportedError(f"the ONNX export has no input named {name}", graph.config.model_type)
    return found


def _states_length(graph: Graph) -> str:
    """How many states an encoder's tokens come to: as many, or virtual ones before them."""
    inputs = dict(zip(graph.inputs, inputs_of(graph.trunk), strict=True))
    mask, states = (val(inputs[name]).shape[1] for name in ("encoder_attention_mask", STATES))
    more = states - mask
    return SOURCE if more == 0 else f"{SOURCE} + {int(more)}"


def _sized(shape: Shape, sizes: dict[str, int]) -> list[int]:
    known = {BATCH: sizes["batch"], NEW: sizes["new"], PAST: sizes["past"], TOTAL: sizes["past"] + sizes["new"]}
    known |= {CHOICES: sizes["choices"], SOURCE: sizes["src"], HELD: sizes["held"]}
    found = []
    for size in shape:
        name, _, more = str(size).partition(" + ")
        found.append(known[name] + int(more or 0) if name in known else slots.sized(size, sizes))
    return found


def _outputs(graph: Graph, trunk: Part, runs: tuple[Shapes, ...]) -> list[ir.Value]:
    """Name, dtype and shape of every output: what differs between the runs has the name of the input's size."""
    found: list[ir.Value] = []
    for name, node in zip(graph.outputs, _results(trunk), strict=True):
        first, second = (run.env[node] for run in runs)
        shape = [_size(a, b, name) for a, b in zip(first.shape, second.shape, strict=True)]
        found.append(typed(name, first.dtype, shape))
    return found


def _size(first: int, second: int, name: str) -> int | str:
    if first == second:
        return int(first)
    long = TOTAL if name.startswith("present.") else NEW
    for known in (BATCH, CHOICES, SOURCE, long):
        if [first, second] == [_sized((known,), sizes)[0] for sizes in SIZES]:
            return known
    return LONGER


def _described(graph: Graph, name: str, turned: set[str], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype a tensor is stored with."""
    spec = graph.tensors[name]
    shape = tuple(reversed(spec.shape)) if name in turned else spec.shape
    return shape, spec.dtype or dtype


def _stored(graph: Graph, name: str, turned: set[str], dtype: torch.dtype) -> Any:
    shape, kind = _described(graph, name, turned, dtype)

    def read() -> torch.Tensor:
        if kind in WIDE:
            return graph.inserted[name]()
        tensor = read_tensor(graph, name, kind, torch.device("cpu")).detach()
        return (tensor.t() if name in turned else tensor).to(kind).contiguous()

    return shape, kind, read
