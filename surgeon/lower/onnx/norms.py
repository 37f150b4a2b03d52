"""RMS norms as one operator: ONNX Runtime's, which `surgeon.lower.onnx.fused` joins with the sum before, or opset 23's.

    x · rsqrt(mean(x²) + ε) · w   →   SimplifiedLayerNormalization(x, w) or RMSNormalization(x, w)

Read off torch's own operators while a part is still theirs. For models in fp32: there no cast between them matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten.type_as.default)
_PRODUCT = aten.mul.Tensor


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x `[.., n]` over the root of its mean square, times the weight `[n]`."""
    options: dict[str, Any] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    made = torch.onnx.ops.symbolic(
        "SimplifiedLayerNormalization", [x, weight], options, dtype=x.dtype, shape=list(x.shape)
    )
    return made.to(x.device)  # symbolic operators trace as tensors of the CPU


def fuse(part: fx.Graph, operator: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = norm) -> int:
    """Put an operator in the place of every norm of a part; returns how many."""
    count = 0
    for node in [node for node in part.nodes if node.target is aten.rsqrt.default]:
        found = _norm(node)
        if found is None:
            continue
        x, weight, epsilon, result = found
        with part.inserting_before(result):
            made = part.call_function(operator, (x, weight, epsilon))
        made.meta = dict(result.meta)
        result.replace_all_uses_with(made)
        count += 1
    return count


def _norm(root: fx.Node) -> tuple[fx.Node, fx.Node, float, fx.Node] | None:
    """The input, the weight, ε and the result of the norm that a reciprocal root is of."""
    total: Any = root.args[0]
    if total.target is not aten.add.Tensor or not isinstance(total.args[1], float):
        return None
    mean: Any = total.args[0]
    if mean.target is not aten.mean.dim or list(mean.args[1]) != [-1] or mean.args[2:3] != (True,):
        return None
    square: Any = mean.args[0]
    if square.target is not aten.pow.Tensor_Scalar or square.args[1] != 2:
        return None
    x = square.args[0]
    product = _only(root)
    if product is None or product.target is not _PRODUCT or x not in product.args:
        return None
    result = product
    while (after := _only(result)) is not None and after.target in _CASTS and after.args[0] is result:
        result = after
    scaled = _only(result)
    if scaled is None or scaled.target is not _PRODUCT:
        return None
    weight: Any = next((given for given in scaled.args if given is not result), None)
    return (x, weight, total.args[1], scaled) if _is_vector(weight) else None


def _only(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_vector(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 1
