"""Complex numbers as pairs of real ones, for rotary embeddings that multiply them (Llama 4, DeepSeek V2).

A complex tensor `[..]` becomes a real one `[.., 2]`; ONNX has no complex type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgeon.errors import UnsupportedError

aten = torch.ops.aten


def polar(size: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """size · e^(i · angle)."""
    return torch.stack([size * torch.cos(angle), size * torch.sin(angle)], -1)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(a₀ + i a₁)(b₀ + i b₁)."""
    (a0, a1), (b0, b1) = a.unbind(-1), b.unbind(-1)
    return torch.stack([a0 * b0 - a1 * b1, a0 * b1 + a1 * b0], -1)


def scaled(pair: torch.Tensor, factor: Any) -> torch.Tensor:
    """A complex tensor times a real one or a number."""
    return pair * (factor.unsqueeze(-1) if isinstance(factor, torch.Tensor) else factor)


def unsqueezed(pair: torch.Tensor, dim: int) -> torch.Tensor:
    """A new axis of a complex tensor; negative axes count from before the pair."""
    return pair.unsqueeze(dim if dim >= 0 else dim - 1)


def unpair(part: fx.Graph) -> None:
    """Rewrite a graph's complex nodes.

    Raises:
        UnsupportedError: a complex operator that is not one of these.
    """
    kinds = {node: [_complex(arg) for arg in node.args] for node in part.nodes if node.op == "call_function"}
    for node, complex_args in kinds.items():
        if not (_complex(node) or any(complex_args)):
            continue
        if node.target in (aten.view_as_complex.default, aten.view_as_real.default):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.polar.default:
            node.target = polar
        elif node.target is aten.unsqueeze.default:
            node.target = unsqueezed
        elif node.target is aten.mul.Tensor and all(complex_args):
            node.target = product
        elif node.target is aten.mul.Tensor:
            node.target = scaled
            node.args = node.args if complex_args[0] else (node.args[1], node.args[0])
        elif not _moves(node):
            raise UnsupportedError(f"no ONNX form: {node.target} of complex numbers", str(node.meta.get("path", "")))


def _moves(node: fx.Node) -> bool:
    """Operators that do to the pairs what they do to the numbers."""
    return node.target in (aten.alias.default, aten.detach.default, aten.to.device, aten.contiguous.default)


def _complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_complex()
