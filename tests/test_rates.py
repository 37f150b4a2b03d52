"""Learning rates by parameter, LoRA+ above all (Hayou et al. 2024): groups of the optimiser, and exact resuming."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.zoo.graphs import graph_of
from surgeon import run
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.model import SurgeonModel, load_model
from surgeon.passes import make
from surgeon.rates import grouped, rates
from surgeon.render import Rendered, Sample
from surgeon.train import train

LR = 1e-3
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)


def applied(family: str = "llama", **options: Any) -> Graph:
    return run.apply(graph_of(family), make("lora", **{"rank": 3, "targets": "*.q_proj *.v_proj", **options}))


def samples() -> Rendered:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 112, (6,), generator=generator).tolist() for _ in range(8)]
    return Rendered(tuple(Sample(ids, [-100, *ids[1:]]) for ids in rows))


def trained(model: SurgeonModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_b_learns_faster_than_a_and_embeddings_slowly() -> None:
    graph = applied(targets="q_proj embed_tokens", lr_ratio=16, lr_embedding=2e-6)
    found = rates(graph, LR)
    b = {name for name in graph.trainable() if name.endswith("q_proj.lora.b")}
    assert {name for name, rate in found.items() if rate == 16 * LR} == b
    assert {name.rpartition(".")[2]: rate for name, rate in found.items() if name not in b} == {"a": 2e-6, "b": 2e-6}


def test_biases_learn_as_fast_as_b() -> None:
    found = rates(applied("gpt2", targets="c_attn", bias="all", lr_ratio=4), LR)
    assert {name.rpartition(".")[2] for name in found} == {"b", "bias"}
    assert set(found.values()) == {4 * LR}


def test_whole_weights_learn_at_a_rate_of_their_own() -> None:
    found = rates(applied(modules_to_save="embed_tokens", lr_saved=0.25), LR)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found} == {"embed_tokens"}
    assert set(found.values()) == {LR / 4}
    with pytest.raises(UsageError, match="lr_saved is 0"):
        make("lora", lr_saved=0.0)


def test_one_rate_leaves_the_groups_alone() -> None:
    model = load_model(applied())
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": LR}]
    assert grouped(model, groups, LR) is groups
    assert grouped(torch.nn.Linear(2, 2), groups, LR) is groups


def test_the_first_step_is_adams_with_two_rates(tmp_path: Path) -> None:
    model = load_model(applied(lr_ratio=16))
    before = trained(model)
    train(model, TOKENIZER, samples(), out=tmp_path, steps=1, lr=LR, warmup=0, scheduler="constant", progress=False)
    for name, value in trained(model).items():
        moved = (value - before[name]).abs().max().item()
        # Adam's first step is the rate itself, where the gradient is not 0; that of a is, as b is 0.
        assert moved == pytest.approx(16 * LR if name.endswith(".b") else 0, rel=1e-3), name


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 6, "batch_size": 2, "save_every": 3, "lr": LR, "progress": False}
    whole = load_model(applied(lr_ratio=16, dropout=0.1))
    train(whole, TOKENIZER, samples(), out=tmp_path / "whole", **options)
    half = load_model(applied(lr_ratio=16, dropout=0.1))
    train(half, TOKENIZER, samples(), out=tmp_path / "half", **options)
    (tmp_path / "half" / "checkpoint-6").rename(tmp_path / "later")
    again = load_model(applied(lr_ratio=16, dropout=0.1))
    report = train(again, TOKENIZER, samples(), out=tmp_path / "half", resume=True, **options)
    assert report.resumed_from == 3
    expected = trained(whole)
    assert all(torch.equal(value, expected[name]) for name, value in trained(again).items())


@pytest.mark.parametrize("option", ["lr_ratio", "lr_embedding"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_rates_out_of_range(option: str, value: float) -> None:
    with pytest.raises(UsageError, match=option) as caught:
        make("lora", **{option: value})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("option", ["lr_ratio", "lr_embedding"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_rates_that_are_none(option: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{option} is {value}"):
        make("lora", **{option: value})
