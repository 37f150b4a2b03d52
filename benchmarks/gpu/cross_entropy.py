"""The loss of a linear head and its gradients, beside Liger and plain torch in the same chunks."""

from __future__ import annotations

import torch

from benchmarks.gpu.case import Case, Run, bytes_of, installed
from surgeon import loss, on_gpu
from surgeon.kernels import cross_entropy

# tokens, values of a hidden state, words
SHAPES = {True: [(5, 16, 300)], False: [(4096, 4096, 32000), (4096, 4096, 128256)]}


def cases(device: torch.device, *, small: bool) -> list[Case]:
    dtype = torch.float32 if small else torch.bfloat16
    found = []
    for tokens, size, words in SHAPES[small]:
        logits = torch.randn(tokens, words, device=device, dtype=dtype)
        labels = torch.randint(words, (tokens,), device=device)
        found.append(logit_case(logits, labels))
        if not small:
            hidden, weight = (torch.randn(n, size, device=device, dtype=dtype) / 8 for n in (tokens, words))
            found.append(head_case(hidden, weight, labels))
    return found


def logit_case(logits: torch.Tensor, labels: torch.Tensor) -> Case:
    """The kernel alone."""

    def by(function, given: torch.Tensor) -> Run:  # type: ignore[no-untyped-def]
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            changed = given.clone()
            return function(changed, labels, None, 1.0, 0.0, True), changed

        return run

    tolerance = 1e-5 if logits.dtype == torch.float32 else 1e-2
    return Case(
        "cross_entropy", f"{len(logits)} x {logits.shape[1]}", by(cross_entropy.launch, logits),
        lambda: by(cross_entropy.reference, logits.double())(), tolerance,
        {"torch": by(cross_entropy.reference, logits)}, 0.0, 5.0 * logits.nbytes,
    )  # fmt: skip


def head_case(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Case:
    """`surgeon.loss` with the kernel in the middle; the weight is frozen, as beside an adapter."""

    def by(function, dtype: torch.dtype = hidden.dtype) -> Run:  # type: ignore[no-untyped-def]
        def run() -> tuple[torch.Tensor, torch.Tensor]:
            leaf = hidden.detach().to(dtype).requires_grad_()
            total = function(leaf, weight.to(dtype))
            return total.detach(), torch.autograd.grad(total, leaf)[0]

        return run

    def ours(leaf: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return loss.linear_cross_entropy(leaf, head, None, labels)

    def plain(leaf: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        asked, on_gpu.is_gpu = on_gpu.is_gpu, lambda x: False
        try:
            return ours(leaf, head)
        finally:
            on_gpu.is_gpu = asked

    libraries: dict[str, Run] = {"torch": by(plain)}
    if installed("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        libraries["Liger"] = by(lambda leaf, head: Liger.apply(leaf, head, labels)[0])
    (tokens, size), words = hidden.shape, len(weight)
    return Case(
        "cross_entropy", f"head {tokens} x {size} x {words}", by(ours), by(ours, torch.float64), 2e-2, libraries,
        4.0 * tokens * size * words, bytes_of(hidden, hidden) + 2.0 * weight.nbytes,
    )  # fmt: skip
