"""Cross-entropy of a linear head, in chunks of tokens: the `[tokens, vocab]` logits never exist as one tensor.

    z = scale · (h Wᵀ + b),  z ← cap · tanh(z / cap),  loss = Σ_i (logsumexp(z_i) − z_i[y_i]) / N

The gradient of the loss in z is `softmax(z) − onehot(y)`, so one pass over the chunks computes both the loss and the
gradients of `h`, `W` and `b`; only these are kept for the backward pass (Wijmans et al. 2024, "Cut your losses in
large-vocabulary language models", give the same observation for a fused kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgeon import on_gpu

IGNORE = -100
CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**25}
"""Logits held at once, by device: 256 tokens of a 32k vocabulary on CPU (benchmarks/loss.py)."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits besides the weight: `scale` first, then Gemma 2's `softcap`."""

    chunk_tokens: int
    compute_dtype: torch.dtype
    softcap: float | None = None
    scale: float | None = None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE,
    chunk_tokens: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    num_items: Tensor | int | None = None,
    replaced: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The mean cross-entropy of `hidden [n, h]`, `weight [v, h]`, `bias [v]` against `labels [n]` (already shifted).

    With `replaced`, an index `[r]` and rows `[r, h]`, these stand for those rows of the weight.
    Tokens whose label is `ignore_index` are not computed. The sum is divided by `num_items` where given (gradient
    accumulation counts over several batches), else by the number of labels that count; with none of them the loss
    is 0. The product runs in the autocast dtype, the softmax in fp32 (fp64 for fp64 inputs).
    Returns a scalar; differentiable once in `hidden`, `weight`, `bias` and the rows.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    compute = torch.get_autocast_dtype(device) if autocast else torch.promote_types(hidden.dtype, weight.dtype)
    chunk = chunk_tokens or max(64, CHUNK_LOGITS.get(device, 2**25) // weight.shape[0])
    head = Head(chunk, compute, softcap, scale)
    rows = (labels != ignore_index).nonzero().squeeze(1)
    count: Tensor | int = max(rows.numel(), 1) if num_items is None else num_items
    with torch.autocast(device, enabled=False):
        index, own = replaced or (None, None)
        total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, own, index, labels, rows, head)
        return total / count


def causal_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **options: Any) -> Tensor:
    """`linear_cross_entropy` of a causal model: `hidden [b, t, h]` at t predicts `labels [b, t]` at t + 1.

    `options` are those of `linear_cross_entropy`. The labels are shifted, not the hidden states: no copy of them.
    """
    ignore = options.get("ignore_index", IGNORE)
    targets = torch.nn.functional.pad(labels, (0, 1), value=ignore)[..., 1:]
    return linear_cross_entropy(hidden.flatten(0, -2), weight, bias, targets.flatten(), **options)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses; gradients are computed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own: Tensor | None,
        index: Tensor | None,
        labels: Tensor,
        rows: Tensor,
        head: Head,
    ) -> Tensor:
        work = _Pass(hidden, weight, bias, own, index, head, ctx.needs_input_grad[:4])
        for chunk in rows.split(head.chunk_tokens):
            work.add(chunk, labels[chunk])
        ctx.grads = work.grads()
        return work.loss()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else _scaled(g, grad) for g in ctx.grads), None, None, None, None


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    return gradient * upstream.to(gradient.dtype)


class _Pass:
    """One pass over the chunks: the summed loss and the gradients asked for, in the dtypes of their tensors."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        own: Tensor | None,
        index: Tensor | None,
        head: Head,
        wanted: tuple[bool, ...],
    ) -> None:
        self.head, self.hidden, self.bias, self.index = head, hidden, bias, index
        self.weight = weight.to(head.compute_dtype)
        self.exact = torch.float64 if head.compute_dtype == torch.float64 else torch.float32
        self.losses: list[Tensor] = []
        self.any_grad = any(wanted)
        self.own = None if own is None else own.to(head.compute_dtype)
        self.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias, own))
        self.grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.grad_weight = torch.zeros_like(weight, dtype=self.exact) if wanted[1] else None
        self.grad_bias = torch.zeros_like(bias, dtype=self.exact) if bias is not None and wanted[2] else None
        self.grad_own = torch.zeros_like(own, dtype=self.exact) if own is not None and wanted[3] else None
        # Two buffers for all chunks: fresh ones would fault their pages in again for every chunk.
        shape = (min(head.chunk_tokens, hidden.shape[0]), weight.shape[0])
        self.buffers = [hidden.new_empty(shape, dtype=self.exact) for _ in range(2)]

    def loss(self) -> Tensor:
        """The sum over the tokens added so far; 0 if there were none."""
        return torch.cat(self.losses).sum() if self.losses else self.hidden.new_zeros((), dtype=self.exact)

    def add(self, chunk: Tensor, labels: Tensor) -> None:
        """Adds the tokens `chunk [c]` (row numbers) with `labels [c]`."""
        hidden = self.hidden[chunk].to(self.head.compute_dtype)
        if self._add_on_gpu(chunk, labels, hidden):
            return
        logits, chain = self._logits(hidden)
        target = labels.unsqueeze(1)
        log_p = torch.log_softmax(logits, -1, out=self.buffers[1][: len(chunk)])
        self.losses.append(-log_p.gather(1, target).squeeze(1))
        if not self.any_grad:
            return
        grad = log_p.exp_()
        grad.scatter_add_(1, target, grad.new_full((), -1.0).expand_as(target))
        self._backward(chunk, hidden, chain(grad))

    def _add_on_gpu(self, chunk: Tensor, labels: Tensor, hidden: Tensor) -> bool:
        """`add` by the kernel that turns logits into losses and gradients; False where it is not the one to use."""
        if not on_gpu.scores(hidden, self.bias):
            return False
        logits = hidden @ self.weight.t()
        if self.own is not None:
            logits[:, self.index] = hidden @ self.own.t()
        head = self.head
        bias, gradient = self.bias, self.any_grad
        self.losses.append(on_gpu.losses(logits, labels, bias, head.scale, head.softcap, gradient=gradient))
        if self.any_grad:
            self._backward(chunk, hidden, logits)
        return True

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The logits `[c, v]` in the exact dtype and what maps their gradient to that of the product."""
        logits = self.buffers[0][: len(hidden)]
        if hidden.dtype == self.exact:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            logits.copy_(hidden @ self.weight.t())
        if self.own is not None:
            logits[:, self.index] = (hidden @ self.own.t()).to(self.exact)
        if self.bias is not None:
            logits += self.bias
        scale, cap = self.head.scale, self.head.softcap
        if scale is not None:
            logits *= scale
        if cap is None:
            return logits, lambda g: g if scale is None else g.mul_(scale)
        logits.div_(cap).tanh_()
        slope = torch.addcmul(logits.new_tensor(scale or 1.0), logits, logits, value=-(scale or 1.0))
        return logits.mul_(cap), lambda g: g.mul_(slope)

    def _backward(self, chunk: Tensor, hidden: Tensor, grad: Tensor) -> None:
        if self.grad_bias is not None:
            self.grad_bias += grad.sum(0)
        grad = grad.to(self.head.compute_dtype)
        part = None if self.own is None else grad[:, self.index]
        if part is not None and self.index is not None:
            grad.index_fill_(1, self.index, 0.0)
            if self.grad_own is not None:
                self.grad_own += part.t() @ hidden
        if self.grad_hidden is not None:
            below = grad @ self.weight
            below = below if part is None or self.own is None else below.addmm_(part, self.own)
            self.grad_hidden[chunk] = below.to(self.grad_hidden.dtype)
        if self.grad_weight is None:
            return
        if grad.dtype == self.exact:
            self.grad_weight.addmm_(grad.t(), hidden)
        else:
            self.grad_weight += grad.t() @ hidden

    def grads(self) -> tuple[Tensor | None, ...]:
        """The gradients of hidden, weight, bias and the rows in place of the weight's, for an upstream one of 1."""
        found = (self.grad_hidden, self.grad_weight, self.grad_bias, self.grad_own)
        return tuple(None if g is None else g.to(d) for g, d in zip(found, self.dtypes, strict=True))
