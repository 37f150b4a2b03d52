"""The lowered parts as one ONNX model: layers stamped out, the trunk joined to them, tensors attached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import onnx_ir as ir
import torch

from surgeon.lower.onnx.own_file import DTYPES

INT4, UINT4 = (getattr(torch, name) for name in ("int4", "uint4"))  # which have no arithmetic, and no type
WIDE = {INT4: torch.int8, UINT4: torch.uint8}
"""4-bit dtypes, of which torch has the name, and what holds their values until they are written."""
_PACKED = {INT4: ir.DataType.INT4, UINT4: ir.DataType.UINT4}
_NARROW = {INT4: ml_dtypes.int4, UINT4: ml_dtypes.uint4}
Shape = Sequence[int | str]


@dataclass
class Joined:
    """An ONNX model while it is put together.

    Attributes:
        nodes: of all parts, in any order.
        tensors: the model's tensors by their Hugging Face names, and the parts' small constants.
        read: how a tensor is read when the file is written: (shape, dtype, function), by name.
        sums: of two tensors `[b, t, n]`, none of which is repeated: what a norm may be joined with.
    """

    read: Callable[[str], tuple[tuple[int, ...], torch.dtype, Callable[[], torch.Tensor]]]
    nodes: list[ir.Node] = field(default_factory=list)
    tensors: dict[str, ir.Value] = field(default_factory=dict)
    sums: list[ir.Node] = field(default_factory=list)

    def tensor(self, name: str) -> ir.Value:
        """The initialiser of a tensor; one however many parts read it."""
        if name not in self.tensors:
            shape, dtype, value = self.read(name)
            kind = _PACKED[dtype] if dtype in _PACKED else DTYPES[dtype]
            size = ir.Shape(shape)
            lazy = ir.LazyTensor(lambda: _tensor(value(), dtype, name), dtype=kind, shape=size, name=name)
            self.tensors[name] = ir.Value(name=name, shape=size, type=ir.TensorType(kind), const_value=lazy)
        return self.tensors[name]

    def stamp(self, model: ir.Model, prefix: str, values: Mapping[int, ir.Value]) -> list[ir.Value]:
        """Add a copy of a part's nodes that reads `values` for its inputs, by position; returns its outputs."""
        graph = model.graph.clone()
        for name, value in list(graph.initializers.items()):
            del graph.initializers[name]
            value.name = f"{prefix}{name}"
            self.tensors[value.name] = value
        nodes = list(graph)
        self.sums += [node for node in nodes if node.op_type == "Add" and _alike(node)]
        kept = {node.inputs[2] for node in nodes if node.op_type == "Attention" and not node.domain}
        for node in nodes:
            node.name = f"{prefix}{node.name}"
            for made in node.outputs:
                made.name, made.shape = f"{prefix}{made.name}", _sizes(made.shape) if made in kept else None
        outputs = list(graph.outputs)
        graph.outputs.clear()
        for given in list(graph.inputs):
            position = int(str(given.name).removeprefix("in_"))
            if position in values:
                outputs = [values[position] if value is given else value for value in outputs]
                given.replace_all_uses_with(values[position])
        graph.remove(nodes)
        self.nodes += nodes
        return outputs


def _sizes(shape: ir.Shape | None) -> ir.Shape | None:
    """Those that are numbers. ONNX Runtime 1.31 says 0 for the width of an Attention whose values' it does not know."""
    return None if shape is None else ir.Shape([size if isinstance(size, int) else None for size in shape])


def _alike(node: ir.Node) -> bool:
    first, second = (value.shape if value is not None else None for value in node.inputs)
    known = first is not None and not any(first.is_unknown_dim(axis) for axis in range(len(first)))
    return first is not None and known and len(first) == 3 and first == second


def _tensor(value: torch.Tensor, dtype: torch.dtype, name: str) -> ir.Tensor:
    array = value.numpy()
    return ir.tensor(array.astype(_NARROW[dtype]) if dtype in _NARROW else array, name=name)


def typed(name: str, dtype: torch.dtype, shape: Shape) -> ir.Value:
    """A value of the model's interface."""
    return ir.Value(name=name, type=ir.TensorType(DTYPES[dtype]), shape=ir.Shape(list(shape)))


def finish(
    joined: Joined, inputs: Sequence[ir.Value], results: Sequence[ir.Value], outputs: Sequence[ir.Value], opset: int
) -> ir.Model:
    """The model: nodes in order, outputs under their names, nothing that tells where it was made."""
    made: set[str] = set()
    final: list[ir.Value] = []
    for value, wanted in zip(results, outputs, strict=True):
        if value.producer() is None or value.name in made:
            node = ir.node("Identity", [value])
            joined.nodes.append(node)
            value = node.outputs[0]
        value.name, value.type, value.shape = wanted.name, wanted.type, wanted.shape
        made.add(str(wanted.name))
        final.append(value)
    used = [value for value in joined.tensors.values() if value.uses()]
    imports = {"": opset, **{node.domain: 1 for node in joined.nodes if node.domain}}
    graph = ir.Graph(list(inputs), final, nodes=joined.nodes, initializers=used, opset_imports=imports, name="model")
    model = ir.Model(graph, ir_version=10, producer_name="surgeon")
    _strip(model)
    return model


def _strip(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
