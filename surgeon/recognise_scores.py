"""Reading an attention in a model's own code: from its softmax back to q kᵀ and forward to v.

    scores = scale · q kᵀ + Σ factor · term, hidden keys filled with a number no softmax sees;
    output = dropout(softmax(scores)) v

Between them may stand casts, reshapes that keep the order of the numbers, and products with constants. Anything else
is a reason why there is no attention node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgeon.graph import val
from surgeon.recognise_values import constant, expression

aten = torch.ops.aten

SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
SDPA = aten.scaled_dot_product_attention.default
CASTS = (aten.to.dtype, aten.type_as.default, aten._to_copy.default)
ROW_MAJOR = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default, aten.clone.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.unsqueeze.default,
)  # fmt: skip
_MATMULS = (aten.matmul.default, aten.bmm.default)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor)
_SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor)
_FILLS = (
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor,
)  # fmt: skip
_CHOICES = (aten.where.self, aten.where.ScalarOther)
_MAXIMA = (aten.max.other, aten.maximum.default)
# exp(-1e4 + x) is 0 in every dtype for any score x a model has; transformers uses -1e4 and the dtypes' minima.
HIDES = -1e4


class NotRecognised(Exception):
    """Why this is no attention that the node describes."""


@dataclass(frozen=True)
class Term:
    """`factor · node`, added to scores of `rank` axes."""

    node: fx.Node
    factor: float
    rank: int


@dataclass(frozen=True)
class Condition:
    """A boolean node that says which keys a query sees (`shows`), or does not see, among scores of `rank` axes."""

    node: fx.Node
    shows: bool
    rank: int


@dataclass
class Attention:
    """One attention in a model's own code.

    Attributes:
        q: operand of the scores, `[.., t, d]`.
        k: operand of the scores, `[.., d, s]` if `k_transposed`, else `[.., s, d]`.
        v: operand of the output `[.., s, d_v]`.
        output: the node that is the output, `[.., t, d_v]`.
        scale: factor of q kᵀ.
        heads: number of heads.
        terms: what is added to the scores.
        conditions: which keys are seen.
        gates: factors of the scores, which must be 1 wherever a key is seen.
        zeroed: where weights are set to zero after the softmax.
        causal: as SDPA has it.
        dropout_p: probability of dropping a weight.
        spine: the nodes in between, which nothing needs when the attention is one node.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    output: fx.Node
    scale: float
    heads: int
    k_transposed: bool = True
    terms: list[Term] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    gates: list[Condition] = field(default_factory=list)
    zeroed: list[Condition] = field(default_factory=list)
    causal: bool = False
    dropout_p: float = 0.0
    spine: list[fx.Node] = field(default_factory=list)


def candidates(part: fx.Graph) -> list[fx.Node]:
    """The nodes that may be attentions: softmaxes over as many numbers as there are keys, and SDPA itself."""
    found = []
    for node in part.nodes:
        weights = node.meta.get("val")
        over_keys = node.target in SOFTMAX and isinstance(weights, torch.Tensor) and weights.dim() > 1
        if node.target is SDPA or (over_keys and bool(expression(val(node).shape[-1]).free_symbols)):
            found.append(node)
    return found


def read(node: fx.Node) -> Attention:
    """The attention around a softmax or an SDPA call.

    Raises:
        NotRecognised: it is another function.
    """
    if node.target is SDPA:
        return _of_sdpa(node)
    axis = node.args[1] if len(node.args) > 1 else None
    if axis not in (-1, val(node).dim() - 1):
        raise NotRecognised("the softmax is not over the last axis")
    output, dropout_p, zeroed, after = _forward(node)
    product, scale, found = _backward(node.args[0])
    heads = _heads(product)
    q, k = product.args[-2:] if product.target is aten.baddbmm.default else product.args[:2]
    return Attention(
        _node(q), _node(k), _node(output.args[1]), output, scale, heads, dropout_p=dropout_p, zeroed=zeroed,
        terms=found.terms, conditions=found.conditions, gates=found.gates, spine=[*found.spine, node, *after],
    )  # fmt: skip


def _node(value: Any) -> fx.Node:
    if not isinstance(value, fx.Node):
        raise NotRecognised("an operand is a number")
    return value


def _of_sdpa(node: fx.Node) -> Attention:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if val(q).dim() != 4:
        raise NotRecognised("scaled_dot_product_attention without an axis of heads")
    scale = given.get("scale")
    made = Attention(
        q, k, v, node, float(scale) if scale is not None else float(val(q).shape[-1]) ** -0.5, int(val(q).shape[1]),
        k_transposed=False, causal=bool(given.get("is_causal")), dropout_p=float(given.get("dropout_p") or 0.0),
    )  # fmt: skip
    if mask is not None and val(mask).dtype == torch.bool:
        made.conditions.append(Condition(mask, True, 4))
    elif mask is not None:
        made.terms.append(Term(mask, 1.0, 4))
    return made


def _heads(product: fx.Node) -> int:
    """The number of heads: the second axis of the scores, or the known factor of `[b · h, t, s]`."""
    shape = val(product).shape
    if len(shape) not in (3, 4):
        raise NotRecognised(f"scores with {len(shape)} axes")
    if len(shape) == 3:
        heads, rest = expression(shape[0]).as_coeff_Mul()
        if not rest.free_symbols:
            raise NotRecognised(f"scores of shape {tuple(shape)}, whose heads are not known")
        return int(heads)
    if not isinstance(shape[1], int):
        raise NotRecognised("a symbolic number of heads")
    return shape[1]


def _forward(softmax: fx.Node) -> tuple[fx.Node, float, list[Condition], list[fx.Node]]:
    """From the softmax to the product with v: that node, the dropout, what is set to zero, and what lies between."""
    node, dropout_p = softmax, 0.0
    zeroed: list[Condition] = []
    passed: list[fx.Node] = []
    while True:
        users = [user for user in node.users if _reads_values(user, node)]
        if len(users) != 1:
            raise NotRecognised(f"{len(users)} nodes read the weights")
        user = users[0]
        if user.target in _MATMULS and user.args[0] is node:
            return user, dropout_p, zeroed, passed
        if user.target is aten.dropout.default:
            dropout_p = float(user.args[1])
        elif user.target in _FILLS and constant(user.args[2]) == 0.0:
            zeroed.append(Condition(_node(user.args[1]), False, val(user).dim()))
        elif user.target not in (*CASTS, *ROW_MAJOR):
            raise NotRecognised(f"{user.target} stands between the softmax and the values")
        passed.append(user)
        node = user


def _reads_values(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user of a node reads its numbers, rather than its shape or dtype."""
    shape_only = user.target in (aten.sym_size.int, getattr, aten.expand_as.default, aten.type_as.default)
    return not shape_only or (user.args[0] is node and user.target not in (aten.sym_size.int, getattr))


@dataclass
class _Found:
    terms: list[Term] = field(default_factory=list)
    conditions: list[Condition] = field(default_factory=list)
    gates: list[Condition] = field(default_factory=list)
    spine: list[fx.Node] = field(default_factory=list)


def _backward(scores: Any) -> tuple[fx.Node, float, _Found]:
    """From what the softmax reads to the product of q and k: that node, its factor, and what was added on the way."""
    found, scale, node = _Found(), 1.0, _node(scores)
    while node.target not in _MATMULS:
        found.spine.append(node)
        if node.target is aten.baddbmm.default:
            beta, alpha = (float(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
            found.terms.append(Term(_node(node.args[0]), scale * beta, 3))
            return node, scale * alpha, found
        node, factor = _step(node, scale, found)
        scale *= factor
        if scale <= 0:
            raise NotRecognised("the scores are multiplied by a negative number")
    found.spine.append(node)
    return node, scale, found


def _step(node: fx.Node, scale: float, found: _Found) -> tuple[fx.Node, float]:
    """One node back towards q kᵀ; returns where to go on and the factor that node was."""
    rank, args = val(node).dim(), node.args
    if node.target in (*CASTS, *ROW_MAJOR):
        return _node(args[0]), 1.0
    if node.target in (*_PRODUCTS, *_QUOTIENTS) and (number := constant(args[1])) is not None:
        return _node(args[0]), number if node.target in _PRODUCTS else 1 / number
    if node.target in _PRODUCTS and isinstance(args[1], fx.Node) and _leads(args[0]):
        found.gates.append(Condition(args[1], True, rank))
        return _node(args[0]), 1.0
    if node.target in _SUMS:
        sign = (-1.0 if node.target is aten.sub.Tensor else 1.0) * float(node.kwargs.get("alpha", 1))
        if _leads(args[0]):
            if constant(args[1]) is None:  # the same number for every key changes nothing
                found.terms.append(Term(_node(args[1]), scale * sign, rank))
            return _node(args[0]), 1.0
        if sign == 1.0 and _leads(args[1]):
            found.terms.append(Term(_node(args[0]), scale, rank))
            return _node(args[1]), 1.0
    if node.target in _FILLS and _hides(args[2]):
        found.conditions.append(Condition(_node(args[1]), False, rank))
        return _node(args[0]), 1.0
    if node.target in _CHOICES and _hides(args[2]):
        found.conditions.append(Condition(_node(args[0]), True, rank))
        return _node(args[1]), 1.0
    if node.target in _MAXIMA and _hides(args[1]):
        return _node(args[0]), 1.0
    raise NotRecognised(f"{node.target} stands between q kᵀ and the softmax")


def _hides(value: Any) -> bool:
    number = constant(value)
    return number is not None and number <= HIDES


def _leads(value: Any) -> bool:
    """Whether a node is, or is computed step by step from, a product of two tensors that both have heads."""
    node, found = value, _Found()
    while isinstance(node, fx.Node):
        if node.target in (*_MATMULS, aten.baddbmm.default):
            return True
        try:
            node, _ = _step(node, 1.0, found)
        except (NotRecognised, AttributeError, KeyError):
            return False
    return False


def split_bias(node: fx.Node) -> tuple[fx.Node, Condition | None] | None:
    """`masked_fill(x, m, min)` as x and the condition; a cast as what it casts; None for anything else."""
    if node.target in CASTS and val(node).is_floating_point() and val(node.args[0]).is_floating_point():
        return _node(node.args[0]), None
    if node.target in _FILLS and _hides(node.args[2]):
        return _node(node.args[0]), Condition(_node(node.args[1]), False, val(node).dim())
    return None
