"""Attention in a model's own code becomes the attention node where it is that function, and only there."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.zoo import build, families
from surgeon import cleanup, module
from surgeon.graph import Graph, TensorSpec
from surgeon.lengths import ATTENTION_OP
from surgeon.program import lifted
from surgeon.recognise import recognise


class Toy(nn.Module):
    """One attention of two heads over embedded tokens, whose weights are what `attend` makes of scores and values."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table, self.project, self.gate = nn.Embedding(16, 8), nn.Linear(8, 24), nn.Linear(8, 2)
        self.attend = attend

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.table(input_ids)
        q, k, v = (x.unflatten(2, (2, 4)).transpose(1, 2) for x in self.project(states).chunk(3, -1))
        result: Tensor = self.attend(self, (q, k, v), attention_mask).transpose(1, 2).flatten(2)  # type: ignore[arg-type]
        return result


def toy(attend: Callable[..., Tensor]) -> Graph:
    """A toy traced as capture traces models, over random weights."""
    with torch.device("meta"):
        model = Toy(attend).to(cleanup.TRACE_DTYPE)
        ids = torch.zeros(2, 5, dtype=torch.int64)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shapes = dict.fromkeys(inputs, dynamic)
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    trunk = lifted(program)[0]
    cleanup.clean(trunk)
    real = Toy(attend)
    build.randomise(real)
    tensors = {name: TensorSpec(tuple(x.shape)) for name, x in real.named_parameters()}
    config = families.tiny_config("llama")
    return Graph(config, "features", trunk, {}, tensors, dict(real.state_dict()), outputs=("out",))


def hidden(mask: Tensor) -> Tensor:
    """Additive: causal and padding, as older models write it."""
    length = mask.shape[1]
    seen = torch.ones(length, length, device=mask.device, dtype=torch.bool).tril()[None] & mask.bool()[:, None]
    return (~seen)[:, None].to(cleanup.TRACE_DTYPE) * -1e9


def plain(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def batched(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in qkv)
    scores = torch.bmm(q, k.transpose(1, 2)).unflatten(0, (-1, 2)) / 2.0 + hidden(mask)
    weights = scores.float().softmax(-1).to(q.dtype).flatten(0, 1)
    return torch.bmm(F.dropout(weights, 0.25), v).unflatten(0, (-1, 2))


def chosen(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, k, v = qkv
    length = mask.shape[1]
    seen = torch.ones(length, length, device=mask.device, dtype=torch.bool).tril()
    scores = torch.where(seen, q @ k.transpose(-1, -2), torch.finfo(q.dtype).min)
    return plain(scores.masked_fill(mask[:, None, None] == 0, -1e9) * 0.5, v)


def zeroed(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, k, v = qkv
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]) == 0
    weights = (q @ k.transpose(-1, -2)).masked_fill(pairs, torch.finfo(q.dtype).min).softmax(-1)
    return weights.masked_fill(pairs, 0.0) @ v


def odd(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Every second key is hidden, which the node has no words for."""
    q, k, v = qkv
    seen = torch.arange(mask.shape[1], device=mask.device) % 2 == 0
    return plain((q @ k.transpose(-1, -2)).masked_fill(~seen, -1e9), v)


def fused(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv, attn_mask=hidden(mask))


# pattern: what the node says of causality, the key mask, and a bias
PATTERNS: dict[Callable[..., Tensor], tuple[bool, bool, bool]] = {
    batched: (True, True, False), chosen: (True, True, False), zeroed: (False, True, False), odd: (False, False, True),
    fused: (True, True, False),
}  # fmt: skip


@pytest.mark.parametrize("attend", PATTERNS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_patterns(attend: Callable[..., Tensor]) -> None:
    graph = toy(attend)
    found, why = recognise(graph, lambda name: None)
    assert why == ""
    (node,) = [node for node in found.trunk.nodes if node.target is ATTENTION_OP]
    given_to = [len(node.args) > place and node.args[place] is not None for place in (3, 4)]
    assert (bool(node.kwargs.get("causal")), *given_to) == PATTERNS[attend]
    assert node.kwargs.get("dropout_p", 0.0) == (0.25 if attend is batched else 0.0)
    ids, mask = torch.randint(16, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    mask[0, :3] = mask[1, 5:] = 0
    old, new = (module.load(x)(ids, mask)[0][mask.bool()] for x in (graph, found))
    torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-5)


def gated(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, k, v = qkv
    weights = (q @ k.transpose(-1, -2) + hidden(mask)).softmax(-1)
    return (weights * torch.sigmoid(self.gate(self.table(mask))).transpose(1, 2)[..., None]) @ v


def squared(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, k, v = qkv
    return plain((q @ k.transpose(-1, -2)).square() + hidden(mask), v)


def talking(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, k, v = qkv
    weights = (q @ k.transpose(-1, -2) + hidden(mask)).softmax(-1)
    mixed = torch.einsum("bhts,gh->bgts", weights, self.gate.weight[:, :2])
    return mixed @ v


def over_queries(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, k, v = qkv
    return (q @ k.transpose(-1, -2) + hidden(mask)).softmax(-2) @ v


def returned(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, k, v = qkv
    weights = (q @ k.transpose(-1, -2) + hidden(mask)).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def experts(self: Toy, qkv: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    q, _, v = qkv
    routed = torch.softmax(self.gate(torch.cat([q, v], -1)), -1)
    return v * routed[..., :1]


REFUSALS: dict[Callable[..., Tensor], str] = {
    gated: "mul.* stands between the softmax and the values", squared: "stands between q kᵀ and the softmax",
    talking: "stands between the softmax and the values", over_queries: "not over the last axis",
    returned: "2 nodes read the weights", experts: "no softmax over keys",
}  # fmt: skip


@pytest.mark.parametrize("attend", REFUSALS, ids=lambda f: f.__name__)
def test_another_function_is_left_as_it_is(attend: Callable[..., Tensor]) -> None:
    graph = toy(attend)
    before = graph.text()
    found, why = recognise(graph, lambda name: None)
    assert found is graph
    assert found.text() == before
    assert re.search(REFUSALS[attend], why)
