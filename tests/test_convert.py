from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.zoo import build
from benchmarks.zoo.custom import OddConfig
from benchmarks.zoo.graphs import close, graph_of, graph_over, outputs_of, randomised
from surgeon import convert, run
from surgeon.errors import UnsupportedError, UsageError
from surgeon.fold import fold
from surgeon.graph import Graph
from surgeon.passes import make
from surgeon.sites import sites


@functools.cache
def odd() -> Graph:
    """The encoder with convolutions of every sort."""
    return graph_over(build.build(OddConfig(), "base"), OddConfig(), "features")


def adapted(*steps: Any, family: str = "llama") -> Graph:
    return randomised(run.apply(graph_of(family), *steps))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "vera", "dylora", "adalora"])
def test_a_method_of_factors_becomes_lora_exactly(name: str, family: str) -> None:
    graph = adapted(make(name, rank=3, targets="all-linear"), family=family)
    made = convert.to_lora(graph)
    assert made.exact
    assert [step.name for step in made.graph.applied] == ["lora"]
    assert close(outputs_of(made.graph), outputs_of(graph))


def test_sites_that_adalora_took_everything_from_are_left_out() -> None:
    ranks = tuple((f"model.layers.{i}.self_attn.q_proj", i) for i in range(4))
    graph = adapted(make("adalora", rank=4, targets="*.q_proj", ranks=ranks))
    made = convert.to_lora(graph)
    assert {site.path: site.rank for site in made.sites} == {path: rank for path, rank in ranks if rank}
    assert close(outputs_of(made.graph), outputs_of(graph))


def test_stacked_adapters_add_their_ranks() -> None:
    graph = adapted(make("lora", rank=2, targets="*.q_proj"), make("vera", rank=3, targets="*.{q,v}_proj"))
    made = convert.to_lora(graph)
    ranks = {site.path.rsplit(".", 1)[1]: site.rank for site in made.sites}
    assert ranks == {"q_proj": 5, "v_proj": 3}
    assert close(outputs_of(made.graph), outputs_of(graph))


def test_a_lower_rank_is_the_best_one_and_its_error_is_said() -> None:
    graph = adapted(make("lora", rank=4, targets="*.q_proj"))
    made = convert.to_lora(graph, rank=2)
    base, weights = graph_of("llama"), fold(graph).values
    for site in made.sites:
        name = f"{site.path}.weight"
        change = (weights[name] - base.values[name]).double()
        s = torch.linalg.svdvals(change)
        assert site.rank == 2
        assert site.error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-3)
        left = fold(made.graph).values[name].double() - base.values[name] - change
        assert float(left.norm() / change.norm()) == pytest.approx(site.error, rel=1e-3)
    bounded = convert.to_lora(graph, error=0.5)
    assert all(site.error <= 0.5 for site in bounded.sites)
    assert not bounded.exact


def test_a_weighted_sum_of_adapters() -> None:
    one, two = adapted(make("lora", rank=2)), adapted(make("vera", rank=3))
    made = convert.combine([one, two], [0.5, -2.0])
    base = graph_of("llama").values
    for name in (f"{site.path}.weight" for site in made.sites):
        wanted = base[name] + 0.5 * (fold(one).values[name] - base[name]) - 2 * (fold(two).values[name] - base[name])
        assert close(fold(made.graph).values[name], wanted)


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_ties_and_dare_at_full_density_of_one_adapter_are_that_adapter(how: str) -> None:
    graph = adapted(make("lora", rank=3))
    made = convert.combine([graph], [1.0], how=how, density=1.0, rank=3)
    assert max(site.error for site in made.sites) < 1e-5
    assert close(outputs_of(made.graph), outputs_of(graph))


def test_the_difference_of_two_models() -> None:
    graph = adapted(make("lora", rank=3, targets="all-linear"), family="gpt2")
    base, tuned = graph_of("gpt2"), fold(graph)
    made = convert.extract(base, tuned.values, rank=3)
    assert max(site.error for site in made.sites) < 1e-3
    assert close(outputs_of(made.graph), outputs_of(tuned))


def test_what_lora_cannot_hold_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="changes no weight"):
        convert.to_lora(adapted(make("lora"), make("prompt", tokens=3)))
    with pytest.raises(UnsupportedError, match="trained whole") as caught:
        convert.to_lora(adapted(make("lora", modules_to_save="lm_head")))
    assert "lm_head" in str(caught.value)
    with pytest.raises(UnsupportedError, match="whole matrix"):
        convert.combine([adapted(make("lora"))], [1.0], how="ties")
    with pytest.raises(UnsupportedError, match="also differ in"):
        convert.extract(graph_of("llama"), {}, rank=2)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    graph = adapted(make("lora"))
    with pytest.raises(UsageError, match="no adapter to convert"):
        convert.to_lora(graph_of("llama"))
    with pytest.raises(UsageError, match="2 weights for 1"):
        convert.combine([graph], [1.0, 2.0])
    with pytest.raises(UsageError, match="density is 0"):
        convert.combine([graph], [1.0], how="ties", density=0.0)
    with pytest.raises(UsageError, match="unknown way"):
        convert.combine([graph], [1.0], how="mean")
    base = graph_of("llama")
    with pytest.raises(UsageError, match="are the same"):
        convert.extract(base, base.values, rank=1)


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("mixtral", "dylora", {"targets": "*.experts.*"}),
        ("llama4_text", "lora", {"targets": "*.experts.*"}),
        ("gpt_neox", "lora", {"targets": "query_key_value", "parts": "q,v"}),
        ("odd", "lora", {"targets": "grouped", "rank": 8}),
        ("odd", "adalora", {"targets": "plain,plane"}),
    ],
)
def test_experts_parts_and_convolutions(family: str, name: str, options: dict[str, Any]) -> None:
    base = odd() if family == "odd" else graph_of(family)
    graph = randomised(run.apply(base, make(name, **{"rank": 4, **options})))
    made = convert.to_lora(graph)
    assert made.exact
    assert close(outputs_of(made.graph), outputs_of(graph))
    weights, lower = fold(graph).values, convert.to_lora(graph, rank=options.get("rank", 4) // 2)
    found = fold(lower.graph).values
    for error in lower.sites:
        name = next(site.weight for site in sites(base) if site.path == error.path)
        left, change = (found[name] - weights[name]).norm(), (weights[name] - base.values[name]).norm()
        assert 0 < error.error < 1
        assert float(left / change) == pytest.approx(error.error, rel=1e-3)
