"""The angles of rotary embeddings, in the trunk: a table of all positions, or those of the tokens at hand.

Queries and keys meet in differences of their angles. Where an angle is a number times the position, and a table of all
positions is what the model would compute, it does not matter where a row starts to count: the operator counts places in
the row, padding with them. Both is tried on numbers before the table is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, Graph
from surgeon.lower.onnx.rotary import HALVES, ONCE, repeated
from surgeon.module import read_tensor

aten = torch.ops.aten
POSITIONS, IDS = "position_ids", "input_ids"
_CPU, _META = torch.device("cpu"), torch.device("meta")
_FAR = 512
_CLOSE = 1e-3
"""Angles of positions below `_FAR` in fp32 are off by less than this."""


class Angles:
    """What the trunk of a graph knows of rotary embeddings."""

    def __init__(self, graph: Graph, trunk: fx.Graph, limit: int) -> None:
        """Of a graph whose trunk is changed; limit is the number of its positions, 0 if it is not known."""
        self.graph, self.trunk, self.limit = graph, trunk, limit
        self.inputs = {str(node.target): node for node in trunk.nodes if node.op == "placeholder"}
        self._made: dict[tuple[fx.Node, str, bool], fx.Node] = {}
        self._copies: dict[fx.Node, Any] = {}
        self._start = [node for node in trunk.nodes if node.op == "placeholder"][-1].next

    def has(self, node: fx.Node, table: str) -> bool:
        """Whether a node of the trunk has its angles the way a rotation reads them."""
        found = self._at(node, torch.arange(7)[None])
        return found is not None and torch.equal(repeated(_angles(found, table), table), found)

    def relative(self, cos: fx.Node, sin: fx.Node, table: str) -> bool:
        """Whether only differences of positions count, and a position's angle is its own."""
        if not self.limit:
            return False
        far = min(self.limit, _FAR)
        p, q = torch.randint(0, far // 2, (2, 64), generator=torch.Generator().manual_seed(0))
        parts = [self._at(node, torch.cat([torch.zeros(1).long(), p, q, p + q])[None]) for node in (cos, sin)]
        if parts[0] is None or parts[1] is None:
            return False
        c, s = (_angles(part[0].double(), table) for part in parts if part is not None)
        z = torch.complex(c, s)
        one, at_p, at_q, at_sum = z.split([1, 64, 64, 64])
        straight = bool((one.imag == 0).all()) and bool((at_p * at_q - one * at_sum).abs().max() < _CLOSE)
        return straight and all(self._own(node) for node in (cos, sin))

    def _own(self, node: fx.Node) -> bool:
        """Whether positions beside one, the last among them, do not change what is at it."""
        some = [0, 1, self.limit // 3, self.limit - 1]
        whole = self._at(node, torch.tensor([some]))
        alone = [self._at(node, torch.tensor([[position]])) for position in some]
        return whole is not None and torch.equal(whole, torch.cat([one for one in alone if one is not None], 1))

    def table(self, node: fx.Node, table: str) -> fx.Node:
        """The angles of all positions `[limit, r / 2]`, which runtimes compute when they load the model."""
        return self._once((node, table, True), self._start, lambda: (in_a_row, (self._copied(node), table)))

    def current(self, node: fx.Node, table: str) -> fx.Node:
        """The angles of the tokens at hand, row after row `[b t, r / 2]`."""
        return self._once((node, table, False), node.next, lambda: (in_a_row, (node, table)))

    def of_tokens(self, node: fx.Node, table: str) -> fx.Node:
        """The angles of the tokens at hand `[b, t, r / 2]`."""
        key = (node, f"{table} of tokens", False)
        return self._once(key, node.next, lambda: (of_tokens, (node, self.inputs[IDS], table)))

    def places(self, node: fx.Node) -> fx.Node:
        """Which of the current angles each token has `[b, t]`."""
        return self._once((node, "", False), node.next, lambda: (places, (node, self.inputs[IDS])))

    def _once(self, key: tuple[fx.Node, str, bool], before: fx.Node, call: Callable[[], tuple[Any, Any]]) -> fx.Node:
        if key not in self._made:
            with self.trunk.inserting_before(before):
                self._made[key] = self.trunk.call_function(*call())
        return self._made[key]

    def _copied(self, node: fx.Node) -> fx.Node:
        """The same node for all positions in place of those that the model is given."""
        instead = self._copies
        if not instead:
            options = {"dtype": torch.int64, "device": _META}
            numbers = self.trunk.call_function(aten.arange.default, (self.limit,), options)
            instead[self.inputs[POSITIONS]] = self.trunk.call_function(aten.unsqueeze.default, (numbers, 0))
        for source in self._sources(node):
            if source in instead:
                continue
            if _is_size(source):
                instead[source] = (1, self.limit)[int(str(source.args[1]))]
            elif source.op != "placeholder":
                instead[source] = self.trunk.node_copy(source, lambda old: instead.get(old, old))
        found: fx.Node = instead[node]
        return found

    def _sources(self, node: fx.Node) -> Iterator[fx.Node]:
        """What a node of the trunk is made of, in order, itself included."""
        seen, ahead = {node}, [node]
        while ahead:
            new = [source for source in ahead.pop().all_input_nodes if source not in seen]
            seen.update(new)
            ahead += new
        return (known for known in self.trunk.nodes if known in seen)

    def _at(self, node: fx.Node, positions: torch.Tensor) -> torch.Tensor | None:
        """A node at positions `[b, t]`, None if it is made of anything else."""
        made: dict[fx.Node, Any] = {}
        for source in self._sources(node):
            if _is_size(source):
                made[source] = positions.shape[int(str(source.args[1]))]
            elif source.op == "placeholder":
                made[source] = positions if source.target == POSITIONS else None
            elif source.op == "get_attr":
                made[source] = self._constant(str(source.target))
            elif source.op == "call_module" or any(made[one] is None for one in source.all_input_nodes):
                made[source] = None
            else:
                args, kwargs = (fx.node.map_arg(given, made.get) for given in (source.args, source.kwargs))
                kwargs = {**kwargs, "device": _CPU} if "device" in kwargs else kwargs
                made[source] = source.target(*args, **kwargs)
        found = made[node]
        return found if isinstance(found, torch.Tensor) and not found.is_complex() else None

    def _constant(self, name: str) -> Any:
        if name in (MODEL_DTYPE, MODEL_DEVICE):
            return torch.float32 if name == MODEL_DTYPE else _CPU
        return read_tensor(self.graph, self.graph.resolve(name), torch.float32, _CPU).detach()


def in_a_row(angles: torch.Tensor, table: str) -> torch.Tensor:
    """`[b, t, r | r / 2]` → `[b t, r / 2]`."""
    return _angles(angles, table).flatten(0, 1)


def of_tokens(angles: torch.Tensor, ids: torch.Tensor, table: str) -> torch.Tensor:
    """`[b | 1, t, r | r / 2]` → `[b, t, r / 2]`, for as many rows as ids `[b, ..]` have."""
    return _angles(angles, table).expand(ids.shape[0], -1, -1)


def places(angles: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The rows of `in_a_row` of angles `[b | 1, t, ..]` for ids `[b, t]`."""
    rows, tokens = angles.shape[:2]
    return torch.arange(rows * tokens, device=ids.device).reshape(rows, tokens).expand(ids.shape)


def _angles(found: torch.Tensor, table: str) -> torch.Tensor:
    half = found.shape[-1] // 2
    return found if table == ONCE else found[..., :half] if table == HALVES else found[..., ::2]


def _is_size(node: fx.Node) -> bool:
    asked: Any = node.args[0] if node.target is aten.sym_size.int else None
    return asked is not None and asked.op == "placeholder" and asked.target in (IDS, POSITIONS)
