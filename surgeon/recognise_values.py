"""Running parts of a captured graph on small real tensors, to see what they compute.

A mask, a bias or a whole attention is a small function of its operands, the key mask and the sizes: it can be run
without any weight of the model, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from surgeon import ops
from surgeon.cleanup import TRACE_DTYPE
from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, Graph
from surgeon.wiring import inputs_of

assert ops  # registers the operators
Buffers = Callable[[str], torch.Tensor | None]
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_DROPPING = (_SDPA, torch.ops.surgeon.attention.default)
_CHOICES = 2
KINDS = ("ones", "left", "right", "holes")


class Impure(Exception):
    """A value depends on more than the key masks and the sizes."""


def expression(size: Any) -> sympy.Expr:
    """A size as a formula of the symbols of the trace."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


@dataclass(frozen=True)
class Sizes:
    """Numbers for the symbols of a trace, and key masks of that size.

    Attributes:
        batch: rows; of two choices each for multiple choice.
        length: tokens; of the decoder in an encoder-decoder model.
        source: tokens of the encoder.
        kind: how the masks are padded, one of `KINDS`.
    """

    batch: int
    length: int
    source: int
    kind: str = "left"

    def symbols(self, graph: Graph) -> dict[sympy.Expr, sympy.Integer]:
        """Every symbolic size of the model's inputs → its number."""
        found: dict[sympy.Expr, sympy.Integer] = {}
        for node in sorted(inputs_of(graph.trunk), key=lambda n: not str(n.target).endswith("input_ids")):
            shape = node.meta["val"].shape
            numbers = (self.batch, *[_CHOICES] * (len(shape) - 2), self._length(graph, node))
            for size, number in zip(shape, numbers, strict=True):
                found.setdefault(expression(size), sympy.Integer(number))
        return found

    def _length(self, graph: Graph, node: fx.Node) -> int:
        encoder = "decoder_input_ids" in graph.inputs and not str(node.target).startswith("decoder_")
        return self.source if encoder else self.length

    def masks(self, graph: Graph) -> dict[fx.Node, torch.Tensor]:
        """A mask for every key mask among the model's inputs; every row has a token."""
        masks = [node for node in inputs_of(graph.trunk) if str(node.target).endswith("attention_mask")]
        return {node: self._mask(len(node.meta["val"].shape), self._length(graph, node)) for node in masks}

    def _mask(self, rank: int, length: int) -> torch.Tensor:
        rows = self.batch * _CHOICES ** (rank - 2)
        mask = torch.ones(rows, length, dtype=torch.int64)
        most = max(length - 1, 0)
        for row in range(rows):
            hidden = min(most, 2 * row + 1) if self.kind in ("left", "right") else 0
            if self.kind == "left":
                mask[row, :hidden] = 0
            elif self.kind == "right":
                mask[row, length - hidden :] = 0
            elif self.kind == "holes":
                mask[row, row % 2 : most : 3] = 0
        return mask.reshape(self.batch, *[_CHOICES] * (rank - 2), length)


@dataclass
class Values:
    """The values of nodes of one part for given sizes; computed when asked for.

    Attributes:
        graph: the graph with its trunk.
        part: the trunk or a layer.
        call: the call of the layer whose arguments its inputs are; None for the trunk.
        sizes: numbers for the symbols, and the key masks.
        buffers: layer path and name → the value of a buffer that no checkpoint stores, None for anything else.
        known: values that are given.
        evaluation: dropout keeps everything; otherwise a value it touches is not known.
    """

    graph: Graph
    part: fx.Graph
    call: fx.Node | None
    sizes: Sizes
    buffers: Buffers
    known: dict[fx.Node, Any] = field(default_factory=dict)
    evaluation: bool = False

    def __post_init__(self) -> None:
        self._symbols: Mapping[sympy.Expr, sympy.Integer] = self.sizes.symbols(self.graph)
        self.known = {**self.sizes.masks(self.graph), **self.known}

    def __call__(self, node: Any) -> Any:
        """The value of a node.

        Raises:
            Impure: it depends on something that is not known.
        """
        if not isinstance(node, fx.Node):
            return node
        if node not in self.known:
            self.known[node] = self._compute(node)
        return self.known[node]

    def number(self, size: Any) -> int:
        """A size of the trace as a number."""
        found = expression(size).xreplace(self._symbols)
        if found.free_symbols:
            raise Impure(f"the size {found}")
        return int(found)

    def random(self, node: fx.Node, generator: torch.Generator) -> torch.Tensor:
        """A random tensor of the shape of a node, in fp32."""
        shape = [self.number(size) for size in node.meta["val"].shape]
        return torch.randn(shape, generator=generator)

    def _compute(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return self.number(value)
        if node.op == "placeholder":
            return self(self._given(node))
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if self.evaluation and node.target is torch.ops.aten.dropout.default:
            return self(node.args[0])
        drops = self.evaluation and node.target in _DROPPING
        if node.op != "call_function" or (
            not drops and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        ):
            raise Impure(node.name)
        if (shaped := self._shaped(node)) is not None:
            return shaped
        # Nothing is changed in place: values are remembered.
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self._argument(node))
        if drops:
            args = (*args[:4], 0.0, *args[5:]) if node.target is _SDPA and len(args) > 4 else args
            kwargs = {name: 0.0 if name == "dropout_p" else value for name, value in kwargs.items()}
        return node.target(*args, **kwargs)

    def _shaped(self, node: fx.Node) -> Any:
        """What reads only the shape or dtype of its second argument, or only that of its first."""
        value = node.meta.get("val")
        if node.target is getattr and node.args[1] == "dtype":
            return torch.float32 if value == TRACE_DTYPE else value
        if node.target is torch.ops.aten.expand_as.default:
            return self(node.args[0]).expand([self.number(size) for size in node.meta["val"].shape])
        if node.target is torch.ops.aten.type_as.default:
            dtype = node.meta["val"].dtype
            return self(node.args[0]).to(torch.float32 if dtype == TRACE_DTYPE else dtype)
        return None

    def _argument(self, node: fx.Node) -> Callable[[fx.Node], Any]:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            return self
        return lambda source: v.clone() if isinstance(v := self(source), torch.Tensor) else v

    def _given(self, node: fx.Node) -> Any:
        if self.call is None or node.graph is not self.part:
            raise Impure(node.name)
        return self.call.args[inputs_of(self.part).index(node)]

    def _attribute(self, name: str) -> Any:
        if name == MODEL_DTYPE:
            return torch.float32
        if name == MODEL_DEVICE:
            return torch.device("cpu")
        value = self.buffers(f"{self.call.target}.{name}" if self.call is not None else name)
        if value is None:
            value = self.buffers(name)
        if value is None:
            raise Impure(name)
        return value.float() if value.dtype == TRACE_DTYPE else value


def constant(node: Any) -> float | None:
    """The number that a scalar argument is, whether written or computed from numbers; None for anything else."""
    if isinstance(node, (int, float)) and not isinstance(node, bool):
        return float(node)
    if not isinstance(node, fx.Node) or not _is_scalar(node.meta.get("val")):
        return None
    try:
        return float(_Constants()(node))
    except (Impure, TypeError):
        return None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, torch.Tensor) and value.dim() == 0)


class _Constants(Values):
    """Values that depend on nothing at all."""

    def __init__(self) -> None:
        self.call, self.known, self.evaluation = None, {}, False

    def number(self, size: Any) -> int:
        raise Impure(str(size))

    def _given(self, node: fx.Node) -> Any:
        raise Impure(node.name)

    def _attribute(self, name: str) -> Any:
        if name == MODEL_DTYPE:
            return torch.float32
        if name == MODEL_DEVICE:
            return torch.device("cpu")
        raise Impure(name)
