"""Which keys an attention sees, read off what its own code computes and described as the attention node has it.

The conditions are run on key masks with padding left, right and in between, at lengths on both sides of every number in
their arithmetic, and compared with the description at every pair of positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from surgeon import ops
from surgeon.graph import Graph, val
from surgeon.recognise_scores import HIDES, ROW_MAJOR, Condition, Term
from surgeon.recognise_values import KINDS, Impure, Sizes, Values

ValuesOf = Callable[[Sizes], Values]
_SMALL = (5, 9, 34)
_LONGEST = 2100
_ENDLESS = 2**31
_POSITIONS = ("max_position_embeddings", "max_seq_len")


@dataclass(frozen=True)
class Pattern:
    """Causal, a window, and which of the model's inputs masks the keys: see `surgeon.ops.visible`."""

    causal: bool = False
    window: int = 0
    mask: fx.Node | None = None


def four_axes(x: torch.Tensor, rank: int, heads: int) -> torch.Tensor:
    """A tensor that is broadcast against scores of `rank` axes, against `[b, h, t, s]`."""
    if rank == 3 and x.dim() == 3 and x.shape[0] != 1:
        return x.unflatten(0, (-1, heads))
    return x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))


def sees(values: Values, conditions: Iterable[Condition], terms: Iterable[Term], heads: int) -> torch.Tensor | None:
    """Where every condition and every term shows a key; None if a term is more than zeros and hiding numbers.

    Raises:
        Impure: one of them depends on the text.
    """
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    for condition in conditions:
        shown = four_axes(values(condition.node).to(torch.bool), condition.rank, heads)
        seen = seen & (shown if condition.shows else ~shown)
    for term in terms:
        added = four_axes(values(term.node), term.rank, heads) * term.factor
        if not bool(((added == 0) | (added <= HIDES / 16)).all()):
            return None
        seen = seen & (added == 0)
    return seen


def is_mask(values_of: ValuesOf, term: Term) -> bool:
    """Whether a term is computed from key masks and sizes alone, and hides keys or does nothing."""
    try:
        return all(
            sees(values_of(Sizes(2, 7, 9, kind)), [], [Term(term.node, term.factor, 4)], 1) is not None
            for kind in KINDS
            if values_of(Sizes(2, 7, 9, kind))(term.node).is_floating_point()
        )
    except (Impure, RuntimeError):
        return False


def describe(
    graph: Graph, values_of: ValuesOf, conditions: Sequence[Condition], terms: Sequence[Term], heads: int
) -> Pattern | None:
    """What conditions and terms say about which keys are seen, or None where the attention node has no words for it."""
    if not conditions and not terms:
        return Pattern()
    try:
        cases = _cases(graph, values_of, conditions, terms, heads)
        return next((p for p in _guesses(graph, cases) if all(_agrees(p, *case) for case in cases)), None)
    except (Impure, RuntimeError, _Unclear):
        return None


class _Unclear(Exception):
    """A term is more than a mask, or the arithmetic turns at a length too long to try."""


def _cases(
    graph: Graph, values_of: ValuesOf, conditions: Sequence[Condition], terms: Sequence[Term], heads: int
) -> list[tuple[Values, torch.Tensor]]:
    """Values and what is seen, for every length and padding to try."""
    found = []
    lengths = [*_SMALL]
    for position, length in enumerate(_SMALL):
        for kind in KINDS:
            values = values_of(Sizes(3, length, length + 2, kind))
            found.append((values, _seen(values, conditions, terms, heads)))
        if position == 0:
            lengths = _turns(graph, found[0][0])
    for length, kind in itertools.product(lengths, ("ones", "left")):
        values = values_of(Sizes(1, length, length + 2, kind))
        found.append((values, _seen(values, conditions, terms, heads)))
    return found


def _seen(values: Values, conditions: Sequence[Condition], terms: Sequence[Term], heads: int) -> torch.Tensor:
    seen = sees(values, conditions, terms, heads)
    if seen is None or (seen.shape[1] > 1 and not bool((seen == seen[:, :1]).all())):
        raise _Unclear
    return seen[:, 0]


def _turns(graph: Graph, values: Values) -> list[int]:
    """Lengths just past every number and every buffer in what was computed."""
    numbers: set[int] = set()
    for node, value in values.known.items():
        leaves = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        numbers |= {abs(leaf) for leaf in leaves if isinstance(leaf, int) and not isinstance(leaf, bool)}
        if node.op == "get_attr" and isinstance(value, torch.Tensor):
            numbers |= set(value.shape)
    text = graph.config.get_text_config()
    most = min(getattr(text, name, None) or _ENDLESS for name in _POSITIONS)
    turns = {min(number + 3, most) for number in numbers if max(_SMALL) - 3 < number < _ENDLESS}
    if any(turn > _LONGEST for turn in turns):
        raise _Unclear
    return sorted(turns)


def _guesses(graph: Graph, cases: list[tuple[Values, torch.Tensor]]) -> list[Pattern]:
    """Descriptions that fit the longest unpadded case."""
    full = max((seen for values, seen in cases if values.sizes.kind == "ones"), key=lambda seen: seen.shape[-1])[0]
    square = full.shape[0] == full.shape[1]
    causal = square and full.shape[1] > 1 and not bool(full.triu(1).any())
    counted = int(full[-1].sum())
    window = counted if causal and counted < full.shape[1] else 0
    return [Pattern(causal, window, mask) for mask in (None, *_masks(graph))]


def _masks(graph: Graph) -> list[fx.Node]:
    """The key masks `[b, s]`: inputs of the model, or those of multiple choice with one row for each choice."""
    inputs = [node for node in graph.trunk.nodes if str(node.target).endswith("attention_mask")]
    flat = [user for node in inputs for user in node.users if user.target in ROW_MAJOR and val(user).dim() == 2]
    return [node for node in (*inputs, *flat) if val(node).dim() == 2]


def _agrees(pattern: Pattern, values: Values, seen: torch.Tensor) -> bool:
    """Whether a description says what is seen, at every query that is a token."""
    sizes = values.sizes
    queries, keys = seen.shape[1], seen.shape[2]
    mask = None if pattern.mask is None else values(pattern.mask)
    if keys == 1 and not pattern.causal:
        keys = sizes.length if mask is None else mask.shape[1]
    if mask is not None and mask.shape[1] != keys:
        return False
    if pattern.causal and queries == 1 < keys:
        return False
    said = ops.visible(mask, queries, keys, causal=pattern.causal, window=pattern.window, chunk=0, device=seen.device)
    rows = token_rows(values, queries)
    shape = (len(rows), queries, keys)
    ours = torch.ones(shape, dtype=torch.bool) if said is None else said[:, 0].expand(shape)
    theirs = seen.expand(shape)
    return torch.equal(ours[rows], theirs[rows])


def token_rows(values: Values, queries: int) -> torch.Tensor:
    """Which queries `[b, t]` are tokens; all, where the queries have no mask of their own."""
    masks = [value.flatten(0, -2) for value in values.sizes.masks(values.graph).values()]
    fitting = [mask.bool() for mask in masks if mask.shape[1] == queries]
    return fitting[0] if fitting else torch.ones(len(masks[0]) if masks else 1, queries, dtype=torch.bool)
