from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.zoo.graphs import graph_of, inputs_of, randomised
from benchmarks.zoo.oracles import losses_on
from surgeon import fold, run
from surgeon.errors import UsageError
from surgeon.model import load_model
from surgeon.normal import Base
from surgeon.passes import make
from surgeon.passes.vera import projections


def peft_projections(rank: int, key: int, targets: list[str]) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    options = peft.VeraConfig(r=rank, target_modules=targets, projection_prng_key=key)
    model = peft.get_peft_model(LlamaForCausalLM(config), options)
    a, b = model.base_model.vera_A["default"], model.base_model.vera_B["default"]
    return a, b, a.shape[1], b.shape[0]


@pytest.mark.parametrize(
    ("rank", "key", "targets"),
    [(4, 0, ["q_proj"]), (7, 3, ["q_proj", "v_proj"]), (256, 0, ["up_proj", "down_proj"]), (1, 9, ["k_proj"])],
)
def test_projections_have_pefts_bits(rank: int, key: int, targets: list[str]) -> None:
    a, b, inp, out = peft_projections(rank, key, targets)
    ours = projections(rank, inp, out, key)
    assert torch.equal(ours[0], a)
    assert torch.equal(ours[1], b)


def test_the_graph_holds_those_projections() -> None:
    graph = run.apply(graph_of("llama"), make("vera", rank=5, targets="*.{up,down}_proj", key=3))
    a, b, inp, out = peft_projections(5, 3, ["up_proj", "down_proj"])
    assert (inp, out) == (48, 48)
    assert torch.equal(graph.inserted["vera.A"](), a)
    assert torch.equal(graph.inserted["vera.B"](), b)
    frozen = {name for name, spec in graph.tensors.items() if spec.owner == "vera" and not spec.trainable}
    assert frozen == {"vera.A", "vera.B"}


def test_it_is_the_formula_in_numpy() -> None:
    trained = randomised(run.apply(graph_of("gpt2"), make("vera", rank=5, targets="all-linear")))
    rng = np.random.default_rng(0)
    for item in fold.folds(trained):
        site, p = item.site, {name: read().double().numpy() for name, read in item.params.items()}
        x, weight = rng.normal(size=(4, site.inp)), rng.normal(size=(site.out, site.inp))
        a, b = p["A"][:, : site.inp], p["B"][: site.out]
        expected = x @ weight.T + p["b"] * ((p["d"] * (x @ a.T)) @ b.T)
        merged = item.normal(Base(lambda: torch.empty(0))).merged(torch.from_numpy(weight))
        found = x @ merged.numpy().T
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_first_values() -> None:
    graph = run.apply(graph_of("llama"), make("vera", rank=5, d_initial=0.25))
    prefix = "model.layers.0.self_attn.q_proj.vera"
    assert graph.inserted[f"{prefix}.d"]().tolist() == [0.25] * 5
    assert not graph.inserted[f"{prefix}.b"]().any()


def test_later_sites_must_fit_the_matrices() -> None:
    step = run.apply(graph_of("llama"), make("vera", rank=2, targets="*.k_proj")).applied[0]
    assert step.options()["max_out"] == 16
    with pytest.raises(UsageError, match="shared matrices are for 16 × 32") as caught:
        run.apply(graph_of("llama"), make("vera", **{**step.options(), "targets": "*.q_proj"}))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "word"), [({"rank": 0}, "rank"), ({"rank": -1}, "rank"), ({"dropout": 1.0}, "dropout")]
)
def test_options_out_of_range(options: dict[str, float], word: str) -> None:
    with pytest.raises(UsageError, match=f"vera: {word}"):
        make("vera", **options)


def test_dropout_is_on_the_adapters_input_while_training() -> None:
    graph = randomised(run.apply(graph_of("llama"), make("vera", rank=5, dropout=0.5)), std=1.0)
    model, inputs = load_model(graph), dict(zip(graph.inputs, inputs_of(graph), strict=True))
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_it_learns_four_points() -> None:
    model = load_model(run.apply(graph_of("llama"), make("vera", rank=64, targets="all-linear"))).train()
    ids = torch.randint(3, 112, (4, 6), generator=torch.Generator().manual_seed(0))
    losses = losses_on(model, ids, lr=0.1, steps=40)
    assert losses[-1] < 0.3 * losses[0]
