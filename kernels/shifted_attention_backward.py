"""Shifted sparse attention, backward, and the operator that trains.

    P = exp2(S − lse)   δ_i = Σ_d dO ⊙ O   dS = P ⊙ (dO Vᵀ − δ) · scale
    dQ = dS K           dK = dSᵀ Q         dV = Pᵀ dO          (FlashAttention, Dao et al. 2022, algorithm 4)

Two kernels, neither of which adds to memory, so that a gradient is the same bits every time:

* dQ: a program owns BM queries of one head and walks over the keys of their segment, as in the forward pass. It has dO
  and O in its hands and leaves δ behind for the other kernel.
* dK, dV: a program owns BN keys of one *K/V head* and walks over the query heads that read it, and for each over the
  queries of the segment that see the keys. The gradients of K and V are summed over the query heads in registers; no
  tensor of the size of q is made for them.

A K/V head whose query heads lie in both halves (h_kv odd) is cut at two kinds of boundaries. There a program takes
those of its query heads that lie in one half, and the two parts are summed afterwards; nobody else pays for it.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.kernels import shifted_attention
from surgeon.kernels.aot import Variant
from surgeon.kernels.jit import Float, Int, Ptr, kernel
from surgeon.kernels.operators import operator
from surgeon.kernels.shifted_attention import LOG2E, Pattern, geometry, reference, strides, tile, variant
from surgeon.kernels.shifted_tiles import bounds, first_token, follows, load_rows, not_padding, store_rows, tokens

if TYPE_CHECKING:
    import triton.language as tl


@kernel("segments*G/BM", "B*H")
def shifted_attention_queries(
    q: Ptr, k: Ptr, v: Ptr, o: Ptr, do: Ptr, dq: Ptr, lse: Ptr, delta: Ptr, mask: Ptr, first: Ptr, scale: Float,
    q_b: Int, q_h: Int, q_t: Int, k_b: Int, k_h: Int, k_t: Int, v_b: Int, v_h: Int, v_t: Int,
    o_b: Int, o_h: Int, o_t: Int, do_b: Int, do_h: Int, do_t: Int, dq_b: Int, dq_h: Int, dq_t: Int,
    B: Int, H: Int, REPEAT: Int, HALF: Int, T: Int, G: Int, WINDOW: Int, segments: Int,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WRAP: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """dQ and δ of BM queries of one head."""
    row, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    tiles = tl.cdiv(G, BM)
    segment, tile = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles
    shift = tl.where(head >= HALF, G // 2, 0)
    start = first_token(first, row, MASKED)
    low, high = bounds(shift, start, T, WRAP)
    end = tl.minimum((segment + 1) * G, high)
    begin = segment * G + tile * BM
    if (begin >= end) | (begin + BM <= low):
        return
    p = begin + tl.arange(0, BM)
    inside = (p >= low) & (p < end)
    token = tokens(p, shift, start, T, G, WRAP)
    query = load_rows(q + row * q_b + head * q_h, token, q_t, inside, D, BD, UPCAST)
    upper = load_rows(do + row * do_b + head * do_h, token, do_t, inside, D, BD, UPCAST)
    out = load_rows(o + row * o_b + head * o_h, token, o_t, inside, D, BD, UPCAST)
    kept = (row * H + head) * T + token
    mean = tl.sum(upper.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta + kept, mean, mask=inside)
    top = tl.load(lse + kept, mask=inside, other=float("inf"))
    k_at, v_at = k + row * k_b + head // REPEAT * k_h, v + row * v_b + head // REPEAT * v_h
    result = tl.zeros((BM, BD), tl.float32)
    from_key, to_key = tl.maximum(segment * G, low), end
    if CAUSAL:
        to_key = tl.minimum(end, begin + BM)
    if WINDOWED:
        from_key = tl.maximum(from_key, begin - WINDOW + 1)
    for at in range(from_key, to_key, BN):
        n = at + tl.arange(0, BN)
        n_inside = n < end
        n_token = tokens(n, shift, start, T, G, WRAP)
        keys = load_rows(k_at, n_token, k_t, n_inside, D, BD, UPCAST)
        values = load_rows(v_at, n_token, v_t, n_inside, D, BD, UPCAST)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        is_key = not_padding(mask + row * T, n_token, n_inside, MASKED)
        visible = follows(p[:, None], n[None, :], is_key[None, :], WINDOW, CAUSAL, WINDOWED)
        weights = tl.where(visible, tl.exp2(scores - top[:, None]), 0.0)
        slope = weights * (tl.dot(upper, tl.trans(values), input_precision="ieee") - mean[:, None])
        result = tl.dot(slope.to(keys.dtype), keys, result, input_precision="ieee")
    store_rows(dq + row * dq_b + head * dq_h, token, dq_t, inside, result * scale, D, BD)


@kernel("segments*G/BN", "B*H/REPEAT", "PARTS")
def shifted_attention_keys(
    q: Ptr, k: Ptr, v: Ptr, do: Ptr, dk: Ptr, dv: Ptr, lse: Ptr, delta: Ptr, mask: Ptr, first: Ptr, scale: Float,
    q_b: Int, q_h: Int, q_t: Int, k_b: Int, k_h: Int, k_t: Int, v_b: Int, v_h: Int, v_t: Int,
    do_b: Int, do_h: Int, do_t: Int, dk_p: Int, dk_b: Int, dk_h: Int, dk_t: Int,
    B: Int, H: Int, REPEAT: Int, HALF: Int, T: Int, G: Int, WINDOW: Int, segments: Int,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WRAP: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """dK and dV of BN keys of one K/V head, from its query heads in one half. dv is laid out as dk."""
    heads = H // REPEAT
    row, kv_head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    first_head, end_head = kv_head * REPEAT, kv_head * REPEAT + REPEAT
    part = tl.where(first_head >= HALF, 1, 0)
    if PARTS == 2:
        part = tl.program_id(2)
        first_head = tl.where(part == 1, tl.maximum(first_head, HALF), first_head)
        end_head = tl.where(part == 1, end_head, tl.minimum(end_head, HALF))
    shift = tl.where(part == 1, G // 2, 0)
    tiles = tl.cdiv(G, BN)
    segment = tl.program_id(0) // tiles
    start = first_token(first, row, MASKED)
    low, high = bounds(shift, start, T, WRAP)
    end = tl.minimum((segment + 1) * G, high)
    begin = segment * G + tl.program_id(0) % tiles * BN
    if (begin >= end) | (begin + BN <= low):
        return
    n = begin + tl.arange(0, BN)
    n_inside = (n >= low) & (n < end)
    n_token = tokens(n, shift, start, T, G, WRAP)
    keys = load_rows(k + row * k_b + kv_head * k_h, n_token, k_t, n_inside, D, BD, UPCAST)
    values = load_rows(v + row * v_b + kv_head * v_h, n_token, v_t, n_inside, D, BD, UPCAST)
    is_key = not_padding(mask + row * T, n_token, n_inside, MASKED)
    grad_k, grad_v = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    from_query, to_query = tl.maximum(segment * G, low), end
    if CAUSAL:
        from_query = tl.maximum(from_query, begin)
    if WINDOWED:
        to_query = tl.minimum(end, begin + BN - 1 + WINDOW)
    for head in range(first_head, end_head):
        for at in range(from_query, to_query, BM):
            p = at + tl.arange(0, BM)
            inside = p < end
            token = tokens(p, shift, start, T, G, WRAP)
            query = load_rows(q + row * q_b + head * q_h, token, q_t, inside, D, BD, UPCAST)
            upper = load_rows(do + row * do_b + head * do_h, token, do_t, inside, D, BD, UPCAST)
            kept = (row * H + head) * T + token
            top = tl.load(lse + kept, mask=inside, other=float("inf"))
            mean = tl.load(delta + kept, mask=inside, other=0.0)
            scores = tl.dot(keys, tl.trans(query), input_precision="ieee") * (scale * LOG2E)
            visible = follows(p[None, :], n[:, None], is_key[:, None] & inside[None, :], WINDOW, CAUSAL, WINDOWED)
            weights = tl.where(visible, tl.exp2(scores - top[None, :]), 0.0)
            grad_v = tl.dot(weights.to(upper.dtype), upper, grad_v, input_precision="ieee")
            slope = weights * (tl.dot(values, tl.trans(upper), input_precision="ieee") - mean[None, :])
            grad_k = tl.dot(slope.to(query.dtype), query, grad_k, input_precision="ieee")
    at = part * (PARTS - 1) * dk_p + row * dk_b + kv_head * dk_h
    store_rows(dk + at, n_token, dk_t, n_inside, grad_k * scale, D, BD)
    store_rows(dv + at, n_token, dk_t, n_inside, grad_v, D, BD)


def launch(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    shared, heads = geometry(q, k, mask, pattern), k.shape[1]
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    dq = torch.empty_like(q) if mask is None else torch.zeros_like(q)
    delta = torch.empty_like(lse)
    shared |= {"q": q, "k": k, "v": v, "do": grad, "lse": lse, "delta": delta} | strides(q=q, k=k, v=v, do=grad)
    owned, walked, queries = (tile(pattern.group, most) for most in tiles(shared["BD"]))
    blocks = {"BM": owned, "BN": walked}
    shifted_attention_queries.launch(**shared, **blocks, **strides(o=out, dq=dq), o=out, dq=dq, **OPTIONS)
    parts = 2 if heads % 2 and q.shape[1] > 1 else 1
    make = torch.empty if mask is None and parts == 1 else torch.zeros
    dk, dv = (make(parts, *k.shape, dtype=k.dtype if parts == 1 else torch.float32, device=k.device) for _ in "kv")
    blocks |= {"BM": queries, "BN": owned, "PARTS": parts, "dk_p": dk.stride(0)}
    shifted_attention_keys.launch(**shared, **blocks, **strides(dk=dk[0]), dk=dk, dv=dv, **OPTIONS)
    return dq, dk.sum(0, dtype=k.dtype) if parts > 1 else dk[0], dv.sum(0, dtype=v.dtype) if parts > 1 else dv[0]


def tiles(size: int) -> tuple[int, int, int]:
    """What a program owns, the keys that dQ walks over, and the queries that dK and dV walk over.

    Two accumulators of 128 columns leave room for tiles of 16 queries without a spill on sm_100.
    """
    return 64, 32, 16 if size > 64 else 32


OPTIONS = {"warps": 8, "stages": 2}


def _differentiated(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> Any:
    """On a CPU: the reference differentiated, laid out as on a GPU."""

    def differentiate() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = reference(leaves[0], leaves[1], leaves[2], mask, Pattern(*rest[2:]))
        return torch.autograd.grad(out, leaves, grad)

    with ThreadPoolExecutor(1) as thread:  # in this one autograd is off, as in every kernel of an operator
        found = thread.submit(differentiate).result()
    return tuple(made.copy_(gradient) for made, gradient in zip(_gradients(grad, q, k, v), found, strict=True))


def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Room for dQ, laid out as q, and for dK and dV."""
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


_PATTERN = "float scale, int group, bool causal, bool wrap, int window"
shifted_attention_op = operator(
    f"shifted_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, {_PATTERN}) -> (Tensor, Tensor)",
    launch=lambda q, k, v, mask, *pattern: shifted_attention.launch(q, k, v, mask, Pattern(*pattern)),
    reference=lambda q, k, v, mask, *pattern: (
        torch.empty_like(q).copy_(reference(q, k, v, mask, Pattern(*pattern))),
        q.new_zeros(q.shape[:3], dtype=torch.float32),
    ),
    fake=lambda q, k, v, mask, *pattern: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)),
)
"""The output and lse, which the backward pass reads on a GPU; zeros on a CPU. Trains."""

shifted_attention_backward_op = operator(
    "shifted_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, "
    f"{_PATTERN}) -> (Tensor, Tensor, Tensor)",
    launch=lambda grad, q, k, v, mask, out, lse, *p: launch(grad, q, k, v, mask, out, lse, Pattern(*p)),
    reference=_differentiated,
    fake=_gradients,
)
"""The gradients of q, k and v."""


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, *ctx.pattern = inputs
    ctx.save_for_backward(q, k, v, mask, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *shifted_attention_backward_op(grad, *ctx.saved_tensors, *ctx.pattern), *[None] * 6


shifted_attention_op.register_autograd(_backward, setup_context=_keep)


def _variants(dtype: str, size: int, masked: bool) -> tuple[Variant, Variant]:
    kind = f"*{dtype}"
    padding = "*u8 *i32" if masked else f"{kind} {kind}"
    owned, walked, along = tiles(size)
    queries = {"BM": owned, "BN": walked, "MASKED": masked}
    keys = {"BM": along, "BN": owned, "MASKED": masked, "PARTS": 1}
    pointers = " ".join([kind] * 6 + ["*fp32", "*fp32", padding])
    return (
        variant(shifted_attention_queries, pointers, dtype, size, queries, **OPTIONS),
        variant(shifted_attention_keys, pointers, dtype, size, keys, **OPTIONS),
    )


_KINDS = itertools.product(("bf16", "fp16"), (128, 64), (True, False))
VARIANTS = tuple(itertools.chain.from_iterable(_variants(*kind) for kind in _KINDS))
