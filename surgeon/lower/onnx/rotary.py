"""Rotary embeddings, known by what they compute.

Heads x `[.., d]` become

    x cos + turned(x) sin   on the first r channels, x on the others

where turned(x) is (-x₂, x₁) of the two halves of the channels, or of the two in every pair. Whatever torch operators a
model writes it in, the nodes between a projection and its attention are run on random numbers: they are polynomials,
and two that agree on random numbers are the same. What is no rotation stays as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgeon.graph import MODEL_DEVICE, MODEL_DTYPE, val
from surgeon.lower.onnx.rows import is_turned

BATCH, TOKENS = 2, 11
TOLERANCE = 1e-5
HALVES, PAIRS, ONCE = "halves", "pairs", "once"
"""How a table of cosines has those of r / 2 angles: [a, b, a, b], [a, a, b, b] or [a, b]."""


@dataclass(frozen=True)
class Rotation:
    """What an argument of an attention is.

    Attributes:
        x: what is turned, `[b, h, t, d]` or `[b, t, h, d]`.
        cos: the layer's input with the cosines, `[b | 1, t, r]` or `[b | 1, t, r / 2]`.
        sin: that with the sines.
        channels: r.
        pairs: channels 2i and 2i + 1 are turned together; without, i and i + r / 2.
        table: how cos and sin have their angles, see above.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    channels: int
    pairs: bool
    table: str

    def like(self, other: Rotation) -> bool:
        """Whether both turn by the same angles in the same way."""
        return (self.cos, self.sin, self.pairs, self.table) == (other.cos, other.sin, other.pairs, other.table)


def find(node: fx.Node) -> Rotation | None:
    """The rotation that a node `[b, h, t, d]` of a layer is the result of, None if there is none."""
    entered = _entry(node)
    if entered is None:
        return None
    x, tables, inside = entered
    sizes = _sizes(x, tables)
    if val(x).dim() != 4 or sizes is None:
        return None
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(_shape(x, sizes), generator=generator)
    whole = sample.transpose(1, 2) if is_turned(x) else sample
    for cos, sin in (tables, tables[::-1]):
        width = int(val(cos).shape[-1])
        for table, pairs in itertools.product((HALVES, PAIRS, ONCE), (False, True)):
            channels = 2 * width if table == ONCE else width
            if channels % 2 or channels > whole.shape[-1] or val(sin).shape != val(cos).shape:
                continue
            size = (*_shape(cos, sizes)[:-1], channels // 2)
            c, s = (torch.randn(size, generator=generator) for _ in range(2))
            known = {x: sample, cos: repeated(c, table), sin: repeated(s, table)}
            if _agree(_run(inside, known, sizes, node), turned(whole, c, s, pairs=pairs)):
                return Rotation(x, cos, sin, channels, pairs, table)
    return None


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: bool) -> torch.Tensor:
    """The rotation above; x `[b, h, t, d]`, cos and sin `[b | 1, t, r / 2]`."""
    channels = 2 * cos.shape[-1]
    kind = PAIRS if pairs else HALVES
    cos, sin = (repeated(table, kind).unsqueeze(1) for table in (cos, sin))
    first, rest = x[..., :channels], x[..., channels:]
    if pairs:
        other = torch.stack([-first[..., 1::2], first[..., ::2]], -1).flatten(-2)
    else:
        other = torch.cat([-first[..., channels // 2 :], first[..., : channels // 2]], -1)
    return torch.cat([first * cos + other * sin, rest], -1)


def repeated(angles: torch.Tensor, table: str) -> torch.Tensor:
    """A table of r / 2 angles `[.., r / 2]` as models write it."""
    if table == ONCE:
        return angles
    return torch.cat([angles, angles], -1) if table == HALVES else angles.repeat_interleave(2, -1)


def _entry(end: fx.Node) -> tuple[fx.Node, tuple[fx.Node, fx.Node], list[fx.Node]] | None:
    """The one node that everything goes through but two tables, those, and what lies behind."""
    place = {node: number for number, node in enumerate(end.graph.nodes)}
    ahead, tables, inside = {end}, dict[fx.Node, None](), list[fx.Node]()
    while ahead and len(tables) <= 2:
        node = max(ahead, key=place.__getitem__)
        if len(ahead) == 1 and len(tables) == 2 and isinstance(node.meta.get("val"), torch.Tensor):
            first, second = tables
            return node, (first, second), sorted(inside, key=place.__getitem__)
        ahead.remove(node)
        if node.op != "call_function":
            return None
        inside.append(node)
        sources = list(node.all_input_nodes)
        while sources:
            source = sources.pop()
            if _is_number(source) or _is_kind(source):
                continue
            if source.op == "placeholder":
                tables[source] = None
            elif _is_table(source):
                inside += [] if source in inside else [source]
                sources += source.all_input_nodes
            else:
                ahead.add(source)
    return None


def _is_table(node: fx.Node) -> bool:
    """Whether a node is made of the layer's inputs alone, without a weight of its."""
    return node.op == "call_function" and all(
        source.op == "placeholder" or _is_number(source) or _is_kind(source) or _is_table(source)
        for source in node.all_input_nodes
    )


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _is_kind(node: fx.Node) -> bool:
    return node.op == "get_attr" and node.target in (MODEL_DTYPE, MODEL_DEVICE)


def _sizes(x: fx.Node, tables: Iterable[fx.Node]) -> dict[str, int] | None:
    """Numbers for the sizes that vary: of the batch and of the new tokens; None if there are others."""
    names = [str(size) for size in val(x).shape if isinstance(size, torch.SymInt)]
    sizes = dict(zip(names, (BATCH, TOKENS), strict=False))
    named = {str(size) for table in tables for size in val(table).shape if isinstance(size, torch.SymInt)}
    return sizes if named <= set(sizes) else None


def _shape(node: fx.Node, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes.get(str(size)) or int(size) for size in val(node).shape)


def _run(nodes: list[fx.Node], known: dict[fx.Node, Any], sizes: dict[str, int], end: fx.Node) -> Any:
    """What the nodes compute of what is known, None if they need something else."""
    made = dict(known)

    def value(node: fx.Node) -> Any:
        if node in made:
            return made[node]
        if _is_kind(node):
            return torch.float32 if node.target == MODEL_DTYPE else torch.device("cpu")
        found = node.meta["val"]
        return sizes[str(found)] if isinstance(found, torch.SymInt) else found

    try:
        for node in nodes:
            args, kwargs = (fx.node.map_arg(given, value) for given in (node.args, node.kwargs))
            made[node] = node.target(*args, **kwargs)
    except (RuntimeError, KeyError, IndexError):  # sizes that this table does not have
        return None
    return made[end]


def _agree(found: Any, expected: torch.Tensor) -> bool:
    alike = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return alike and bool((found - expected).abs().max() < TOLERANCE)
