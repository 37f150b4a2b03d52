"""surgeon's own operators written in torch operators that every ONNX runtime has.

Put in place of `surgeon::attention` and the like before a graph is lowered: the same function, but without the short
cuts that look at values, with masks as sums, and with rows that see no key giving 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgeon import ops
from surgeon.lower.onnx.complex import unpair

aten = torch.ops.aten


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    role: str = "self",
    prefix: int = 0,
) -> torch.Tensor:
    """`surgeon.ops.attention` by matrix products and a softmax in fp32; arguments and result are the same.

    Query heads that share a K/V head are rows of one product `[b, h_kv, g·t, d] × [b, h_kv, d, s]`: K and V are never
    repeated. The mask is one sum, the same expression in every layer, so that runtimes compute it once.
    """
    batch, heads, queries = q.shape[0], q.shape[1], q.shape[2]
    shared, keys = k.shape[1], k.shape[2]
    seen = ops.visible(mask, queries, keys, causal=causal, window=window, chunk=chunk, device=q.device, prefix=prefix)
    blind = mask is not None
    if bias is not None and bias.dtype == torch.bool:
        seen, bias, blind = (bias if seen is None else seen & bias), None, True
    q = q * scale
    if shared != heads:
        q = q.reshape(batch, shared, -1, q.shape[3])
    scores = q @ k.transpose(-1, -2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float()
    if shared != heads:
        scores = scores.reshape(batch, heads, queries, keys)
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores + _added(seen)
    weights = _softmax(scores, sinks).to(v.dtype)
    if shared != heads:
        weights = weights.reshape(batch, shared, -1, keys)
    result = weights @ v
    if shared != heads:
        result = result.reshape(batch, heads, queries, v.shape[3])
    if blind and seen is not None:
        result = torch.where(seen.any(-1, keepdim=True), result, _scalar(0.0, result.dtype, result.device))
    return result


def _added(seen: torch.Tensor) -> torch.Tensor:
    kind, where = torch.float32, seen.device
    return torch.where(seen, _scalar(0.0, kind, where), _scalar(torch.finfo(kind).min, kind, where))


def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.scalar_tensor(value, dtype=dtype, device=device)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """A softmax over the keys and, if there is one, the sink, whose share is dropped."""
    if sinks is None:
        return torch.softmax(scores, -1)
    column = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """`surgeon.ops.expert_linear`: the rows split by expert, each piece through its matrix, some pieces empty.

    How many rows an expert gets is known only when the model runs, which torch cannot trace and ONNX's Split can do.
    """
    experts, out = weight.shape[0], weight.shape[2] if transposed else weight.shape[1]
    number = torch.arange(experts, device=ids.device)
    counts = (ids[:, None] == number).sum(0)
    pieces = torch.onnx.ops.symbolic_multi_out(
        "Split", (x, counts), {"axis": 0}, dtypes=[x.dtype] * experts, shapes=[list(x.shape)] * experts
    )
    results = []
    for expert, piece in enumerate(pieces):
        matrix = weight[expert] if transposed else weight[expert].t()
        result = piece.to(x.device) @ matrix  # symbolic operators trace as tensors of the CPU
        results.append(result if bias is None else result + bias[expert])
    joined = torch.onnx.ops.symbolic("Concat", results, {"axis": 0}, dtype=x.dtype, shape=[x.shape[0], out])
    return joined.to(x.device)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A linear whose weight is stored `[in, out]`, as runtimes multiply it."""
    result = x @ weight
    return result if bias is None else result + bias


def sort(x: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool = True) -> Any:
    """A stable sort as ONNX has it: TopK of everything, equal values in the order of their places."""
    return torch.topk(x, x.shape[dim], dim, largest=descending, sorted=True)


def argsort(x: torch.Tensor, dim: int = -1, descending: bool = False, *, stable: bool = True) -> torch.Tensor:
    """The places of `sort`."""
    order: torch.Tensor = sort(x, dim, descending)[1]
    return order


STANDARD: dict[Any, Any] = {
    torch.ops.surgeon.attention.default: attention,
    torch.ops.surgeon.expert_linear.default: expert_linear,
    aten.sort.default: sort,
    aten.sort.stable: sort,
    aten.argsort.default: argsort,
    aten.argsort.stable: argsort,
}


def standardise(part: fx.Graph) -> None:
    """Replace operators that ONNX has no form for by the functions above, and by numbers where they are numbers."""
    _fold_numbers(part)
    unpair(part)
    for node in part.nodes:
        if node.target in STANDARD:
            node.target = STANDARD[node.target]


def _fold_numbers(part: fx.Graph) -> None:
    """Compute the inverse error function of constants (Gemma 3n's sparsity)."""
    known: dict[fx.Node, Any] = {}
    for node in part.nodes:
        if node.op != "call_function" or not all(source in known for source in node.all_input_nodes):
            continue
        if not node.all_input_nodes and node.target is not aten.scalar_tensor.default:
            continue
        args, kwargs = (fx.node.map_arg(given, known.get) for given in (node.args, node.kwargs))
        known[node] = node.target(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))
        if node.target is aten.erfinv.default:
            node.target, node.args = aten.scalar_tensor.default, (float(known[node]),)
            node.kwargs = {"dtype": known[node].dtype, "device": torch.device("meta")}
