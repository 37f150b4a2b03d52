"""The attention and expert operators against arithmetic written out, for every option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgeon.ops
from surgeon.ops import visible

assert surgeon.ops
attention = torch.ops.surgeon.attention
expert_linear = torch.ops.surgeon.expert_linear


def tensors(
    rows: int = 2, heads: int = 4, kv: int = 2, queries: int = 6, keys: int = 6, size: int = 8, out: int = 8
) -> list[Tensor]:
    return [
        torch.randn(rows, heads, queries, size),
        torch.randn(rows, kv, keys, size),
        torch.randn(rows, kv, keys, out),
    ]


def seen(query: int, key: int, start: int, causal: bool, window: int, chunk: int) -> bool:
    """One cell of the mask, in plain words; `start` is the first unpadded key."""
    if causal and key > query:
        return False
    if window and (query - key >= window if causal else abs(query - key) > window):
        return False
    return not chunk or (key - start) // chunk == (query - start) // chunk


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, bias: Tensor | None = None,
              sinks: Tensor | None = None, *, scale: float = 0.3, causal: bool = False, window: int = 0, chunk: int = 0,
              softcap: float = 0.0) -> Tensor:  # fmt: skip
    """Query by query, head by head, in double precision."""
    result = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    share = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        keep = torch.ones(k.shape[2], dtype=torch.bool) if mask is None else mask[b].bool()
        start = int(keep.long().argmax())
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                at = t + k.shape[2] - q.shape[2]
                scores = (k[b, h // share].double() @ q[b, h, t].double()) * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if bias is not None:
                    scores = scores + bias.expand(q.shape[0], q.shape[1], q.shape[2], -1)[b, h, t].double()
                rows = [s for s in range(k.shape[2]) if keep[s] and seen(at, s, start, causal, window, chunk)]
                if not rows:
                    continue
                chosen = scores[rows]
                extra = [] if sinks is None else [sinks[h].double().reshape(1)]
                weights = torch.softmax(torch.cat([chosen, *extra]), 0)[: len(rows)]
                result[b, h, t] = weights @ v[b, h // share, rows].double()
    return result


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
OPTIONS: list[dict[str, Any]] = [
    {}, {"causal": True}, {"causal": True, "window": 3}, {"window": 2}, {"causal": True, "chunk": 3}, {"chunk": 2},
    {"causal": True, "softcap": 1.5}, {"causal": True, "window": 3, "softcap": 1.5},
]  # fmt: skip
ids = [", ".join(f"{k}={v}" for k, v in option.items()) or "plain" for option in OPTIONS]


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("extra", ["", "bias", "sinks"])
def test_attention_is_its_definition(options: dict[str, Any], padded: bool, extra: str) -> None:
    q, k, v = tensors(out=5)
    mask = PADDED if padded else None
    bias = torch.randn(1, 4, 6, 6) if extra == "bias" else None
    sinks = torch.randn(4) if extra == "sinks" else None
    found = attention(q, k, v, mask, bias, sinks, scale=0.3, **options)
    assert torch.allclose(found.double(), reference(q, k, v, mask, bias, sinks, **options), atol=2e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_queries_are_the_last_positions(options: dict[str, Any]) -> None:
    q, k, v = tensors(queries=2)
    found = attention(q, k, v, PADDED, scale=0.3, **options)
    assert torch.allclose(found.double(), reference(q, k, v, PADDED, **options), atol=2e-6)


def test_a_boolean_bias_hides() -> None:
    q, k, v = tensors()
    keep = torch.rand(2, 1, 6, 6) > 0.4
    keep[..., 0] = True
    hidden = torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))
    assert torch.allclose(
        attention(q, k, v, None, keep, scale=0.3).double(), reference(q, k, v, None, hidden), atol=2e-6
    )


def test_a_row_that_sees_nothing_is_zero_and_has_finite_gradients() -> None:
    for extra in ({}, {"softcap": 2.0}):
        q, k, v = (x.requires_grad_() for x in tensors())
        result = attention(q, k, v, PADDED, scale=0.3, causal=True, **extra)
        assert not result[0, :, :2].any()
        result.sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_gradients_are_the_definitions() -> None:
    inputs = [x.double().requires_grad_() for x in tensors(queries=3, keys=4, kv=2, size=4, out=3)]
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    sinks = torch.randn(4, dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, None, None, scale=0.5, causal=True, window=2)

    assert torch.autograd.gradcheck(run, inputs)
    assert sinks.shape == (4,)


@pytest.mark.parametrize("extra", [{}, {"softcap": 3.0}], ids=["sdpa", "explicit"])
def test_dropout_acts_when_asked(extra: dict[str, float]) -> None:
    q, k, v = tensors()
    plain = attention(q, k, v, scale=0.3, **extra)
    torch.manual_seed(1)
    dropped = attention(q, k, v, scale=0.3, dropout_p=0.5, **extra)
    torch.manual_seed(1)
    assert torch.equal(dropped, attention(q, k, v, scale=0.3, dropout_p=0.5, **extra))
    assert not torch.allclose(plain, dropped)


def test_attention_is_one_node_of_an_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, scale=0.3, causal=True, window=3)

    program = torch.export.export(Model(), tuple(tensors()), strict=False).run_decompositions({})
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [attention.default]


def test_visible_is_nothing_where_every_key_is_seen() -> None:
    assert visible(None, 3, 3, causal=False, window=0, chunk=0, device=torch.device("cpu")) is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_every_row_goes_through_its_expert(transposed: bool, biased: bool) -> None:
    x, weight, bias = torch.randn(7, 5), torch.randn(4, 3, 5), torch.randn(4, 3) if biased else None
    routed = torch.tensor([0, 0, 1, 1, 1, 3, 3])  # nobody goes to expert 2
    expected = torch.stack(
        [weight[e] @ row + (0 if bias is None else bias[e]) for row, e in zip(x, routed, strict=True)]
    )
    stored = weight.transpose(1, 2).contiguous() if transposed else weight
    found = expert_linear(x, stored, routed, bias, transposed=transposed)
    assert torch.allclose(found, expected, atol=1e-6)
    assert expert_linear(x[:0], stored, routed[:0], bias, transposed=transposed).shape == (0, 3)


def test_experts_train_and_stay_one_node() -> None:
    x, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    routed = torch.tensor([0, 0, 1, 2, 2, 2])
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, w: expert_linear(a, w, routed), inputs)

    class Model(torch.nn.Module):
        def forward(self, a: Tensor, w: Tensor, e: Tensor) -> Tensor:
            return expert_linear(a, w, e)

    dynamic = ({0: torch.export.Dim("n")}, None, {0: torch.export.Dim("n")})
    given = (x.detach(), weight.detach(), routed)
    program = torch.export.export(
        Model(), given, strict=False, dynamic_shapes={"a": dynamic[0], "w": None, "e": dynamic[2]}
    )
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [expert_linear.default]
    longer = torch.randn(9, 5, dtype=torch.float64), weight.detach(), torch.tensor([0] * 4 + [2] * 5)
    assert torch.allclose(program.module()(*longer), expert_linear(*longer))


def test_one_look_for_all_layers(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = surgeon.load(shared / "models/pystdlib-llama")
    looks = []
    whole = torch.Tensor.all
    monkeypatch.setattr(torch.Tensor, "all", lambda self, *args: looks.append(1) or whole(self, *args))
    ids = torch.randint(3, 4000, (2, 6))
    with torch.no_grad():
        model(input_ids=ids)
        assert len(looks) == 1
        model(input_ids=ids)
        assert len(looks) == 2


def test_changed_in_place() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert surgeon.ops._hides_nothing(mask)
    mask[0, 0] = False
    assert not surgeon.ops._hides_nothing(mask)
    with torch.inference_mode():
        assert surgeon.ops._hides_nothing(torch.ones(1, 2, dtype=torch.bool))


def test_alibi_far_from_the_start_is_added_in_fp32() -> None:
    q, k, v = (x.bfloat16() for x in tensors(kv=4, queries=1024, keys=1024))
    bias = (torch.arange(1024.0) - 1023)[None, None, None] * torch.tensor([0.5, 0.25, 0.1, 0.01])[:, None, None]
    exact = attention(q.float(), k.float(), v.float(), None, bias, scale=0.3, causal=True)
    errors = [
        float((attention(q, k, v, None, x, scale=0.3, causal=True).float() - exact)[:, :, :64].abs().max())
        for x in (bias, bias.bfloat16())
    ]
    assert errors[0] < 0.03
    assert errors[1] > 0.3  # the nearest keys of the first queries, whose biases are near -500, are all the same


@pytest.mark.parametrize("options", [{"window": 3}, {"chunk": 3}], ids=["window", "chunk"])
def test_every_query_sees_the_prefix_and_the_rest_is_as_without(options: dict[str, int]) -> None:
    q, k, v = tensors(keys=9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3:5] = False
    rules = {"causal": True, "device": q.device, "window": 0, "chunk": 0, **options}
    shown = visible(mask, 6, 9, prefix=3, **rules)  # type: ignore[arg-type]
    plain = visible(mask[:, 3:], 6, 6, **rules)  # type: ignore[arg-type]
    assert shown is not None
    assert plain is not None
    assert bool(shown[..., :3].all())
    assert torch.equal(shown[..., 3:], plain)
    found = attention(q, k, v, mask, scale=0.3, causal=True, prefix=3, **options)
    expected = attention(q, k, v, None, shown, scale=0.3)
    assert torch.allclose(found, expected, atol=1e-6)
