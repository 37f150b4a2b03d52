from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.zoo.graphs import graph_of, inputs_of, model_of, randomised
from benchmarks.zoo.oracles import losses_on
from surgeon import fold, run
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.model import load_model
from surgeon.normal import Base
from surgeon.passes import make

NOTHING = Base(lambda: torch.empty(0))


def trained(family: str = "llama", **options: Any) -> Graph:
    return randomised(run.apply(graph_of(family), make("lora", **{"rank": 3, **options})))


@torch.no_grad()
def logits(graph: Graph) -> torch.Tensor:
    inputs = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    result = load_model(graph)(**inputs).logits
    assert result is not None
    return result


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 16.0])
def test_it_is_the_formula_in_numpy(rslora: bool, alpha: float) -> None:
    graph = trained(alpha=alpha, rslora=rslora, targets="all-linear")
    rng, s = np.random.default_rng(0), alpha / (math.sqrt(3) if rslora else 3)
    for item in fold.folds(graph)[:7]:
        a, b = (item.params[name]().double().numpy() for name in "ab")
        x, weight = rng.normal(size=(4, item.site.inp)), rng.normal(size=(item.site.out, item.site.inp))
        expected = x @ weight.T + s * (x @ a.T) @ b.T
        found = x @ item.normal(NOTHING).merged(torch.from_numpy(weight)).numpy().T
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "*.up_proj"),
        ("gpt2", "*.c_fc"),
        ("gpt2", "wpe wte"),
        ("bert", "word_embeddings *.query"),
        ("llama", "lm_head"),
    ],
)
def test_the_graph_computes_it(family: str, targets: str) -> None:
    """Against transformers with every targeted module's output moved by s · x aᵀ bᵀ."""
    graph = trained(family, targets=targets)
    model, handles = model_of(family), []
    for item in fold.folds(graph):
        p = item.tensors()

        def hook(module: Any, args: Any, y: torch.Tensor, p: dict[str, torch.Tensor] = p) -> torch.Tensor:
            low = p["a"].T[args[0]] if args[0].dtype == torch.long else args[0] @ p["a"].T
            return y + 16 / 3 * low @ p["b"].T

        handles.append(model.get_submodule(item.site.path).register_forward_hook(hook))
    with torch.no_grad():
        expected = model(**dict(zip(graph.inputs, inputs_of(graph), strict=True))).logits
    for handle in handles:
        handle.remove()
    found = logits(graph)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_first_values() -> None:
    graph = run.apply(graph_of("llama"), make("lora", rank=3, targets="*.q_proj embed_tokens"))
    q, table = "model.layers.0.self_attn.q_proj.lora", "model.embed_tokens.lora"
    assert graph.inserted[f"{q}.a"]().abs().max() <= 1 / math.sqrt(32)
    assert graph.inserted[f"{q}.a"]().any()
    assert not graph.inserted[f"{q}.b"]().any()
    assert not graph.inserted[f"{table}.a"]().any()
    assert graph.inserted[f"{table}.b"]().std() > 0.7
    assert graph.tensors[f"{table}.a"].shape == (3, 112)


def test_ranks_and_alphas_by_pattern() -> None:
    step = make("lora", rank=4, alpha=8, ranks={"*.0.*.q_proj": 2, "q_proj": 6}, alphas={"v_proj": 1})
    graph = run.apply(graph_of("llama"), step)
    found = {(item.site.path[13:]): (item.step.rank, item.step.scale) for item in fold.folds(graph)}  # type: ignore[attr-defined]
    assert found["0.self_attn.q_proj"] == (2, 4.0)
    assert found["1.self_attn.q_proj"] == (6, 8 / 6)
    assert found["3.self_attn.v_proj"] == (4, 0.25)
    assert graph.tensors["model.layers.0.self_attn.q_proj.lora.a"].shape == (2, 32)
    assert graph.tensors["model.layers.1.self_attn.q_proj.lora.b"].shape == (32, 6)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"rank": 0}, "rank"), ({"rank": -4}, "rank"), ({"ranks": {"q_proj": 0}}, "rank"), ({"dropout": 1.0}, "dropout"),
     ({"dropout": -0.1}, "dropout")],
)  # fmt: skip
def test_options_out_of_range(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=f"lora: {word}") as caught:
        make("lora", **options)
    assert caught.value.hint


def test_dropout_is_for_training_alone() -> None:
    graph = trained(dropout=0.25, targets="*.down_proj")
    model, inputs = load_model(graph), dict(zip(graph.inputs, inputs_of(graph), strict=True))
    quiet = model(**inputs).logits
    assert torch.equal(quiet, model(**inputs).logits)
    model.train()
    assert not torch.allclose(model(**inputs).logits, model(**inputs).logits, atol=1e-2)
    without = load_model(trained(targets="*.down_proj")).train()
    assert torch.allclose(without(**inputs).logits, quiet, rtol=0, atol=1e-4)


def test_dropout_is_on_the_adapters_input() -> None:
    graph = trained(dropout=0.25, targets="model.layers.3.mlp.down_proj")
    part = graph.layers["model.layers.3"]
    (drop,) = [node for node in part.nodes if node.target is torch.ops.aten.dropout.default]
    assert drop.args[1:] == (0.25, True)
    assert drop.args[0].meta["val"].shape[-1] == 48


def test_it_learns_four_points() -> None:
    model = load_model(run.apply(graph_of("llama"), make("lora", rank=8, targets="all-linear"))).train()
    ids = torch.randint(3, 112, (4, 6), generator=torch.Generator().manual_seed(0))
    losses = losses_on(model, ids, lr=0.02, steps=40)
    assert losses[-1] < 0.2 * losses[0]
    merged, adapted = fold.fold(model.trained()), model.eval()
    x = dict(zip(merged.inputs, inputs_of(merged), strict=True))
    with torch.no_grad():
        assert torch.allclose(load_model(merged)(**x).logits, adapted(**x).logits, rtol=0, atol=1e-3)
