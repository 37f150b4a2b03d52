"""Shifted sparse attention, forward alone and both passes, beside SDPA, FlexAttention and flash-attn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.case import Case, Run, bytes_of, installed
from surgeon.kernels import shifted_attention as forward
from surgeon.kernels import shifted_attention_backward as backward
from surgeon.kernels.shifted_attention import Pattern

# batch, heads, K/V heads, tokens, values per head, tokens of a segment
SHAPES = {
    True: [(1, 2, 1, 40, 16, 16)],
    False: [(1, 32, 8, 8192, 128, 2048), (1, 32, 8, 32768, 128, 8192), (1, 32, 8, 32768, 128, 2048)],
}
EXACT_TOKENS = 8192
"""Longer texts are compared with SDPA in segments instead of float64, which would not fit."""


def cases(device: torch.device, *, small: bool) -> list[Case]:
    found = []
    for shape in SHAPES[small]:
        batch, heads, kv_heads, length, size, group = shape
        dtype = torch.float32 if small else torch.bfloat16
        q, k, v, grad = (
            torch.randn(batch, h, length, size, device=device, dtype=dtype) for h in (heads, kv_heads, kv_heads, heads)
        )
        pattern = Pattern(size**-0.5, group)
        said = f"{length} in {group}, {heads}/{kv_heads} x {size}"
        products = 2.0 * batch * heads * length * group * size  # q kᵀ and its product with v, halved by causality
        passed = Passes(q, k, v, grad, pattern)
        moved = bytes_of(q, k, v, q)
        tolerance = 1e-5 if small else 2e-2
        found += [
            Case("shifted_attention", f"{said}, forward", passed.out, passed.exact_out, tolerance,
                 {} if small else passed.libraries(), products, moved),
            Case("shifted_attention", f"{said}, both", passed.gradients, passed.exact_gradients, tolerance,
                 {} if small else passed.libraries_backward(), 3.5 * products, 3.0 * moved),
        ]  # fmt: skip
    return found


class Passes:
    """The two passes of one shape, by the kernels, exactly, and by libraries."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, pattern: Pattern) -> None:
        self.q, self.k, self.v, self.grad, self.pattern = q, k, v, grad, pattern

    def out(self) -> torch.Tensor:
        return forward.launch(self.q, self.k, self.v, None, self.pattern)[0]

    def gradients(self) -> tuple[torch.Tensor, ...]:
        out, lse = forward.launch(self.q, self.k, self.v, None, self.pattern)
        return backward.launch(self.grad, self.q, self.k, self.v, None, out, lse, self.pattern)

    def exact_out(self) -> torch.Tensor:
        return self._segments(*(x.to(self._wide) for x in (self.q, self.k, self.v)))

    def exact_gradients(self) -> tuple[torch.Tensor, ...]:
        return self._gradients(self._segments, self._wide)

    def _segments(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """K and V repeated: in fp32 SDPA has no kernel for grouped heads that forgoes the `[t, t]` scores."""
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return forward.reference(q, k, v, None, self.pattern)

    def libraries(self) -> dict[str, Run]:
        """Full attention is another function: it is there for its time."""
        made: dict[str, Run] = {
            "segments": lambda: forward.reference(self.q, self.k, self.v, None, self.pattern),
            "full attention": lambda: self._full(self.q, self.k, self.v),
            "FlexAttention": self.flexible,
        }
        return made | ({"flash-attn": self._varlen} if installed("flash_attn") else {})

    def libraries_backward(self) -> dict[str, Run]:
        def segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return forward.reference(q, k, v, None, self.pattern)

        return {
            "segments": lambda: self._gradients(segments, self.q.dtype),
            "full attention": lambda: self._gradients(self._full, self.q.dtype),
            "FlexAttention": lambda: self._gradients(self.flex, self.q.dtype),
        }

    @property
    def _wide(self) -> torch.dtype:
        return torch.float64 if self.q.shape[2] <= EXACT_TOKENS else torch.float32

    def _full(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.pattern.scale, enable_gqa=True
        )

    def flexible(self) -> torch.Tensor:
        return self.flex(self.q, self.k, self.v)

    def flex(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """torch's FlexAttention, compiled on a GPU, with the segments as a mask of blocks that are left out."""
        attend, mask = _flex(q.device, q.shape[1], q.shape[2], self.pattern.group)
        out: torch.Tensor = attend(q, k, v, block_mask=mask, scale=self.pattern.scale, enable_gqa=True)
        return out

    def _gradients(self, attend, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        return torch.autograd.grad(attend(*leaves), leaves, self.grad.to(dtype))

    def _varlen(self) -> torch.Tensor:
        """LongLoRA's own way: one varlen call for each half of the heads, of which the second is cut elsewhere."""
        from flash_attn import flash_attn_varlen_func

        from surgeon.segments import boundaries

        halves, group, length = [], self.pattern.group, self.q.shape[2]
        for half in (0, 1):
            q, k, v = (x.chunk(2, 1)[half][0].transpose(0, 1) for x in (self.q, self.k, self.v))
            cuts = boundaries(length, group, half * (group // 2))
            ends = torch.tensor(cuts, dtype=torch.int32, device=q.device)
            options = {"softmax_scale": self.pattern.scale, "causal": True}
            halves.append(flash_attn_varlen_func(q, k, v, ends, ends, group, group, **options))
        return torch.cat(halves, 1).transpose(0, 1)[None]


@functools.cache
def _flex(device: torch.device, heads: int, length: int, group: int) -> tuple[Callable[..., Any], Any]:
    """FlexAttention and its mask: the second half of the heads has its segments half a segment further."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        shift = torch.where(head >= heads // 2, group // 2, 0)
        return (key <= query) & ((query + shift) // group == (key + shift) // group)

    mask = create_block_mask(seen, None, heads, length, length, device=str(device))
    return torch.compile(flex_attention) if device.type == "cuda" else flex_attention, mask
