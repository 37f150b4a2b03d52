"""What layers run as while they train equals the graph: values, gradients, and what stays apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

import surgeon
from surgeon import compile as compiling
from surgeon import lean
from surgeon.fuse import fused
from surgeon.lean import bypassed, drawn, frozen_linear, gated_gelu, gated_silu, rms_normalised
from surgeon.model import SurgeonModel
from surgeon.numerics import quantise_4bit
from surgeon.quantised import nf4_maker
from surgeon.sites import LINEAR, sites

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True)).save_pretrained(root / "llama")
    GemmaForCausalLM(GemmaConfig(**SIZES)).save_pretrained(root / "gemma")
    return {"llama": root / "llama", "gemma": root / "gemma"}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs run as they are in training too."""
    monkeypatch.setattr(compiling, "fused", lambda graph: graph)
    compiling._codes.clear()
    yield
    compiling._codes.clear()


def moved(base: Path, method: str, **options: Any) -> SurgeonModel:
    model = surgeon.apply(base, method, targets="all-linear", **options).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def step(model: SurgeonModel, bf16: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def unfused(model: SurgeonModel, request: pytest.FixtureRequest, bf16: bool = False) -> Any:
    request.getfixturevalue("plain")
    return step(model, bf16)


@pytest.mark.parametrize(
    ("family", "method", "checkpointing"),
    [
        ("llama", "lora", False),
        ("llama", "lora", True),
        ("llama", "vera", False),
        ("gemma", "lora", False),
        ("llama", "qlora", False),
        ("llama", "qlora", True),
    ],
)
def test_gradients_equal_the_graph(
    bases: dict[str, Path], family: str, method: str, checkpointing: bool, request: pytest.FixtureRequest
) -> None:
    model = moved(bases[family], method, rank=4, dropout=0.0)
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss, grads = step(model)
    expected_loss, expected = unfused(model, request)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_gradients_under_autocast(bases: dict[str, Path], request: pytest.FixtureRequest) -> None:
    model = moved(bases["llama"], "lora", rank=4)
    exact_loss, exact = step(model)
    loss, grads = step(model, bf16=True)
    plain_loss, plain_grads = unfused(model, request, bf16=True)
    assert loss == pytest.approx(plain_loss, rel=2e-3)
    assert loss == pytest.approx(exact_loss, rel=1e-2)
    assert all(grad.dtype == torch.float32 for grad in grads.values())

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5

    assert error(grads) <= 1.3 * error(plain_grads)


def test_the_graph_is_fused_and_untouched(bases: dict[str, Path]) -> None:
    graph = surgeon.apply(bases["llama"], "lora", targets="all-linear", rank=4).graph
    layer, text = next(iter(graph.layers.values())), graph.text()
    names = [getattr(node.target, "__name__", "") for node in fused(layer).nodes]
    assert [names.count(op) for op in ("bypassed", "rms_normalised", "gated_silu")] == [4, 2, 1]
    assert not any("linear" in name for name in names)
    assert graph.text() == text


def test_a_shared_projection_runs_once_per_input(bases: dict[str, Path]) -> None:
    layer = next(iter(surgeon.apply(bases["llama"], "vera", targets="all-linear", rank=4).graph.layers.values()))

    def linears(graph: torch.fx.Graph) -> int:
        return sum(node.target in (torch.ops.aten.linear.default, frozen_linear) for node in graph.nodes)

    assert linears(layer) - linears(fused(layer)) == 3


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_dropout_is_in_the_operator_with_a_mask_for_every_site(
    bases: dict[str, Path], bf16: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the operator draws as torch does, it is the graph's own dropouts, site by site."""
    monkeypatch.setattr(lean, "drawn", lambda x, drop: torch.empty_like(x).bernoulli_(1 - drop).neg_().to(torch.int8))
    model = moved(bases["llama"], "lora", rank=4, dropout=0.5)
    layer = next(iter(model.graph.layers.values()))
    names = [getattr(node.target, "__name__", "") for node in fused(layer).nodes]
    assert names.count("bypassed") == 4
    assert not any("dropout" in name for name in names)
    loss, grads = step(model, bf16)
    assert step(model, bf16)[0] == loss
    expected_loss, expected = unfused(model, request, bf16)
    assert loss == pytest.approx(expected_loss, rel=2e-3 if bf16 else 1e-6)
    for name, grad in grads.items() if not bf16 else ():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
    assert loss != pytest.approx(step(moved(bases["llama"], "lora", rank=4))[0], rel=1e-4)


@pytest.mark.parametrize("drop", [0.05, 0.5, 0.999999])
def test_what_is_dropped_is_as_often_as_said_and_independent(drop: float) -> None:
    torch.manual_seed(0)
    kept = drawn(torch.empty(999, 1001), drop)
    assert set(kept.unique().tolist()) <= {-1, 0}
    gone = (kept == 0).double()
    assert gone.mean().item() == pytest.approx(drop, abs=4 * (drop * (1 - drop) / gone.numel()) ** 0.5 + 2**-16)
    for step in (1, 2, 3, 1001):
        both = (gone.flatten()[step:] * gone.flatten()[:-step]).mean().item()
        assert both == pytest.approx(drop**2, abs=5 * drop / gone.numel() ** 0.5 + 2**-15)


def test_a_weight_in_codes_is_decoded_again_and_not_kept(bases: dict[str, Path]) -> None:
    """What is saved for the backward pass is a share of what one decoded weight would be."""
    kept: dict[int, torch.Size] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    model = surgeon.apply(bases["llama"], "qlora", rank=4).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    linears = {(site.out, site.inp) for site in sites(model.graph, LINEAR)}
    ids = torch.randint(3, 64, (2, 9))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert not linears & {tuple(shape) for at, shape in kept.items() if at not in own}
    loss.backward()


def test_a_bypass_over_codes_has_the_gradients_of_the_decoded_weight() -> None:
    w = torch.randn(4, 64)
    stored = quantise_4bit(w, double=True)
    assert stored.nested is not None
    make = nf4_maker(stored.codes, stored.absmax, stored.nested.scale, stored.nested.offset, out=4, inp=64)
    x, a, b = (torch.randn(shape, requires_grad=True) for shape in ((3, 64), (2, 64), (4, 2)))
    found, expected = (
        torch.autograd.grad(bypassed(x, (0.5,), (0.0,), weight, None, a, b)[0].square().sum(), (x, a, b))
        for weight in (make, make(torch.float32))
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_evaluation_runs_the_graph_bit_for_bit(bases: dict[str, Path]) -> None:
    ids = torch.randint(3, 64, (2, 9))
    model = surgeon.load(bases["llama"])
    with torch.no_grad():
        reference = LlamaForCausalLM.from_pretrained(bases["llama"])(ids).logits
        assert model(input_ids=ids).logits.equal(reference)


def test_a_trained_weight_beside_a_bypass_keeps_its_gradient() -> None:
    x, w = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5), (4, 2)))
    bypassed(x, (0.5,), (0.0,), w, None, a, b)[0].sum().backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad, x.sum(0).expand(4, 5))


def test_operators_in_fp64() -> None:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    x, gate, up = leaf(2, 3, 5), leaf(2, 4), leaf(2, 4)
    w1, w2, bias = (t.detach() for t in (leaf(4, 5), leaf(6, 5), leaf(6)))

    def run(x: torch.Tensor, *t: torch.Tensor) -> Any:
        return bypassed(x, (0.5, 2.0), (0.0, 0.0), w1, None, t[0], t[1], w2, bias, t[2], t[3])

    t = (leaf(2, 5), leaf(4, 2), leaf(3, 5), leaf(6, 3))
    first, second = run(x, *t)
    torch.testing.assert_close(first, F.linear(x, w1) + 0.5 * x @ t[0].T @ t[1].T)
    torch.testing.assert_close(second, F.linear(x, w2, bias) + 2.0 * x @ t[2].T @ t[3].T)
    assert gradcheck(run, (x, *t))
    assert gradcheck(lambda x: rms_normalised(x, 1e-6), (x,))
    assert gradcheck(gated_silu, (gate, up))
    assert gradcheck(lambda g, u: gated_gelu(g, u, "tanh"), (gate, up))
    torch.testing.assert_close(gated_silu(gate, up[:1]), F.silu(gate) * up[:1])


def test_linears_without_a_bypass_keep_no_input(bases: dict[str, Path]) -> None:
    """Their weights may be trained too (full fine-tuning): then they are torch's."""
    layer = next(iter(surgeon.apply(bases["llama"], "lora", targets="q_proj", rank=4).graph.layers.values()))
    assert [node.target for node in fused(layer).nodes].count(frozen_linear) == 6
    x, w, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (4, 5), (4,)))
    assert gradcheck(frozen_linear, (x, w, bias))
    w, bias = w.detach(), bias.detach()
    assert gradcheck(lambda x: frozen_linear(x, w, bias), (x,))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        frozen_linear(x, w, bias)
    assert [t.data_ptr() for t in kept] == [w.data_ptr()]
