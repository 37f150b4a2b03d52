"""Shifted sparse attention, forward (Chen et al. 2024, LongLoRA, §3.2); `surgeon.segments` is its definition.

    o_i = Σ_j softmax_j(scale · q_i k_j) v_j over the j in the segment of i, j <= i if causal, j > i − window if given

q `[b, h, t, d]`, k and v `[b, h_kv, t, d]` in any layout with d contiguous; mask `[b, t]`, True where the key is a
token. Query head i reads K/V head ⌊i · h_kv / h⌋ where it lies: nothing is repeated. A row that sees no key is 0, as
are the rows before the first token. The forward pass also keeps lse `[b, h, t]`, log2 Σ exp2 of each row.

Tiles: a program owns BM queries of one segment and walks over the keys of that segment, so no key outside is read and
none has to be compared (`surgeon.kernels.shifted_tiles`). The work is t · G / 2 products for each head instead of
t² / 2. The softmax is the running one of FlashAttention (Dao et al. 2022). The last tile of a segment has the most keys
to see and goes first. BM = 128 and BN = 64 at 8 warps keep the fp32 accumulator of 128 columns in 64 registers per
thread; the look-up of padding takes what was left of them on sm_80, and BM = 64 gives it back. A segment shorter than a
tile takes a smaller one.

Replaces: `surgeon.segments` over SDPA, which copies q, k and v into segments and, for left padding or `WRAP`, gathers
them. Libraries: flash-attn's varlen call (LongLoRA's own way: two calls, or twice the batch), FlexAttention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgeon.kernels.aot import Variant
from surgeon.kernels.jit import Float, Int, Ptr, kernel, missing
from surgeon.kernels.shifted_tiles import bounds, first_token, follows, load_rows, not_padding, store_rows, tokens
from surgeon.ops import attention
from surgeon.segments import segmented

if TYPE_CHECKING:
    import triton.language as tl

LOG2E = 1.4426950408889634
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@kernel("segments*G/BM", "B*H")
def shifted_attention_forward(
    q: Ptr, k: Ptr, v: Ptr, o: Ptr, lse: Ptr, mask: Ptr, first: Ptr, scale: Float,
    q_b: Int, q_h: Int, q_t: Int, k_b: Int, k_h: Int, k_t: Int, v_b: Int, v_h: Int, v_t: Int,
    o_b: Int, o_h: Int, o_t: Int, B: Int, H: Int, REPEAT: Int, HALF: Int, T: Int, G: Int, WINDOW: Int, segments: Int,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WRAP: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
) -> None:  # fmt: skip
    """Output and lse of BM queries of one head."""
    row, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    tiles = tl.cdiv(G, BM)
    segment, tile = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles
    shift = tl.where(head >= HALF, G // 2, 0)
    start = first_token(first, row, MASKED)
    low, high = bounds(shift, start, T, WRAP)
    end = tl.minimum((segment + 1) * G, high)
    begin = segment * G + tile * BM
    p = begin + tl.arange(0, BM)
    inside = (p >= low) & (p < end)
    if (begin >= end) | (begin + BM <= low):
        return
    token = tokens(p, shift, start, T, G, WRAP)
    query = load_rows(q + row * q_b + head * q_h, token, q_t, inside, D, BD, UPCAST)
    k_at, v_at = k + row * k_b + head // REPEAT * k_h, v + row * v_b + head // REPEAT * v_h
    top, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
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
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        is_key = not_padding(mask + row * T, n_token, n_inside, MASKED)
        visible = follows(p[:, None], n[None, :], is_key[None, :], WINDOW, CAUSAL, WINDOWED)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        values = load_rows(v_at, n_token, v_t, n_inside, D, BD, UPCAST)
        result = tl.dot(weights.to(values.dtype), values, result * shrink[:, None], input_precision="ieee")
        top = higher
    sees = total > 0
    result = result / tl.where(sees, total, 1.0)[:, None]
    store_rows(o + row * o_b + head * o_h, token, o_t, inside, result, D, BD)
    safe_top = tl.where(sees, top, float("inf"))
    tl.store(lse + (row * H + head) * T + token, safe_top + tl.log2(tl.where(sees, total, 1.0)), mask=inside)


@dataclass(frozen=True)
class Pattern:
    """What is attended to beside q, k, v and the mask."""

    scale: float
    group: int
    causal: bool = True
    wrap: bool = False
    window: int = 0


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern) -> Tensor:
    """SDPA in every segment."""
    attend = functools.partial(attention, scale=pattern.scale, causal=pattern.causal, window=pattern.window)
    parts = (q, k, v, mask, None, None)
    return segmented(*parts, group=pattern.group, wrap=pattern.wrap, prefix=0, attend=attend)


def can_use(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str:
    """Why the kernel does not attend, "" if it does."""
    if q.shape[2] != k.shape[2]:
        return "keys that are no queries (a prefix or a cache)"
    if q.shape[3] != v.shape[3] or q.shape[3] > 128:  # the two accumulators of the backward pass would spill
        return f"heads of {q.shape[3]} and {v.shape[3]} values"
    if {q.dtype, k.dtype, v.dtype} not in ({dtype} for dtype in DTYPES):
        return f"q, k, v in {q.dtype}, {k.dtype}, {v.dtype}"
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return "values of a head that are not contiguous"
    if pattern.window and not pattern.causal:
        return "a window on both sides"
    return missing()


def geometry(q: Tensor, k: Tensor, mask: Tensor | None, pattern: Pattern) -> dict[str, Any]:
    """The arguments that the forward and the backward pass share."""
    batch, heads, length, size = q.shape
    shift = pattern.group // 2 if heads > 1 else 0
    padded = mask is not None
    if mask is not None:
        mask = mask.to(torch.uint8).contiguous()
        first = (mask.cumsum(1) == 0).sum(1, dtype=torch.int32)
    return {
        "mask": mask if padded else q, "first": first if padded else q, "scale": pattern.scale, "B": batch, "H": heads,
        "REPEAT": heads // k.shape[1], "HALF": max(heads // 2, 1), "T": length, "G": pattern.group,
        "WINDOW": pattern.window, "segments": -(-(length + (0 if pattern.wrap else shift)) // pattern.group),
        "D": size, "BD": max(16, 1 << (size - 1).bit_length()), "CAUSAL": pattern.causal, "WRAP": pattern.wrap,
        "WINDOWED": pattern.window > 0, "MASKED": padded, "UPCAST": q.device.type == "cpu",
    }  # fmt: skip


def strides(**tensors: Tensor) -> dict[str, int]:
    """`q=x` → the strides q_b, q_h and q_t of x `[b, h, t, d]`."""
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate("bht")}


def tile(group: int, most: int) -> int:
    """Positions of a tile: `most`, or fewer where a segment is shorter."""
    return max(16, min(most, 1 << (group - 1).bit_length()))


def launch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The output, laid out as q, and lse `[b, h, t]`."""
    out = torch.empty_like(q) if mask is None else torch.zeros_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    shared = geometry(q, k, mask, pattern)
    (rows, columns), options = tiles(shared["BD"], shared["MASKED"])
    shared |= {"BM": tile(pattern.group, rows), "BN": tile(pattern.group, columns)}
    strided = strides(q=q, k=k, v=v, o=out)
    shifted_attention_forward.launch(q=q, k=k, v=v, o=out, lse=lse, **strided, **shared, **options)
    return out, lse


def tiles(size: int, masked: bool) -> tuple[tuple[int, int], dict[str, int]]:
    """BM and BN, warps and stages, by what compiles without a spill on every target."""
    if size > 64 and masked:
        return (64, 64), {"warps": 8, "stages": 2}
    return (128, 64), {"warps": 8, "stages": 2}


def variant(kernel: Any, pointers: str, dtype: str, size: int, constants: dict[str, Any], **options: Any) -> Variant:
    """A variant of the forward or the backward pass: default pattern, heads of `size`, segments of many tiles."""
    padded = "-padded" if constants["MASKED"] else ""
    fixed = {"D": size, "BD": size, "CAUSAL": True, "WRAP": False, "WINDOWED": False, "UPCAST": False}
    numbers = " ".join("i32" for name in kernel.arguments[len(pointers.split()) + 1 :])
    aligned = frozenset(name for name in kernel.arguments if name.endswith(("_b", "_h", "_t")))
    signature = f"{pointers} fp32 {numbers}"
    return Variant(
        kernel, f"{dtype}-d{size}{padded}", signature, fixed | constants, options["warps"], options["stages"], aligned
    )


def _forward(dtype: str, size: int, masked: bool) -> Variant:
    kind = f"*{dtype}"
    padding = "*u8 *i32" if masked else f"{kind} {kind}"
    (rows, columns), options = tiles(size, masked)
    constants = {"BM": rows, "BN": columns, "MASKED": masked}
    pointers = f"{kind} {kind} {kind} {kind} *fp32 {padding}"
    return variant(shifted_attention_forward, pointers, dtype, size, constants, **options)


VARIANTS = tuple(
    _forward(dtype, size, masked) for size in (128, 64) for dtype in ("bf16", "fp16") for masked in (True, False)
)
