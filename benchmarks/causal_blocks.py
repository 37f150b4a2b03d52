"""Causal attention in blocks against torch's flash kernel, forward and backward, in turn; processor time.

    python -m benchmarks.causal_blocks

Which texts `surgeon.causal_blocks` takes over in training follows from this table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from surgeon.causal_blocks import causal_attention

SHAPES = (
    (4, 4, 2, 128, 64),
    (4, 4, 2, 256, 64),
    (2, 10, 10, 512, 64),
    (4, 8, 2, 512, 128),
    (1, 16, 16, 1024, 64),
    (1, 16, 4, 2048, 64),
)
ROUNDS = 9


def step(attend: Callable[..., torch.Tensor], tensors: list[torch.Tensor], above: torch.Tensor) -> float:
    """Seconds of the processor for one forward and backward pass."""
    began = time.process_time()
    attend(*tensors).backward(above)
    return time.process_time() - began


def main() -> None:
    """A line for each shape and precision."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for batch, heads, kv_heads, length, size in SHAPES:
            shapes = [(batch, h, length, size) for h in (heads, kv_heads, kv_heads)]
            tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
            above, scale = torch.randn(shapes[0], dtype=dtype), size**-0.5

            def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = scale) -> torch.Tensor:
                gqa = q.shape[1] != k.shape[1]
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scale, enable_gqa=gqa
                )

            def blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = scale) -> torch.Tensor:
                return causal_attention(q, k, v, scale)

            pairs = [(step(blocks, tensors, above), step(flash, tensors, above)) for _ in range(ROUNDS + 2)][2:]
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            print(
                f"{dtype} {batch} x {heads}/{kv_heads} heads of {size}, {length} tokens: {ratio:.2f} of flash",
                flush=True,
            )


if __name__ == "__main__":
    main()
