from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from benchmarks.zoo.graphs import graph_of
from surgeon import run
from surgeon.edit import Edit
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.passes import make
from surgeon.passes.base import LINEAR, Adapter, Pass, Skip
from surgeon.sites import ATTENTION, Site


@dataclass(frozen=True)
class Once(Pass):
    """Does nothing, once."""

    name: ClassVar[str] = "once"
    stacks: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = (LINEAR,)


def test_passes_get_numbered_names() -> None:
    lora, vera = make("lora", rank=2), make("vera", rank=2)
    graph = run.apply(graph_of("llama"), lora, vera, lora)
    assert run.owners(graph.applied) == {"lora": lora, "vera": graph.applied[1], "lora_2": lora}
    assert {spec.owner for spec in graph.tensors.values()} == {"", "lora", "vera", "lora_2"}
    assert run.owner_of(graph, vera) == "vera_2"
    assert run.owner_of(graph, Once()) == "once"


def test_a_pass_that_does_not_stack_is_refused() -> None:
    graph = run.apply(graph_of("llama"), Once())
    with pytest.raises(UsageError, match="once is already applied") as caught:
        run.apply(graph, Once())
    assert caught.value.hint


def test_prepared_options_are_what_is_recorded() -> None:
    graph = run.apply(graph_of("llama"), make("vera", rank=2, targets="*.mlp.up_proj"))
    assert graph.applied[0].options()["max_in"] == 32
    assert graph.applied[0].options()["max_out"] == 48


def test_requirements_come_before_and_promises_after() -> None:
    asked: list[str] = []

    class Asking(Once):
        def requires(self, graph: Graph) -> None:
            asked.append(f"requires {len(graph.applied)}")

        def ensures(self, result: Graph) -> None:
            asked.append(f"ensures {len(result.applied)}")
            raise SurgeonError("it does not hold")

        def rewrite(self, edit: Edit, site: Site) -> None:
            asked.append("rewrite") if "rewrite" not in asked else None

    with pytest.raises(SurgeonError, match="does not hold"):
        run.apply(graph_of("llama"), Asking())
    assert asked == ["requires 0", "rewrite", "ensures 1"]


def test_an_illegal_rewrite_is_caught_and_leaves_the_graph() -> None:
    base = graph_of("llama")
    before = base.text()

    class Broken(Once):
        def rewrite(self, edit: Edit, site: Site) -> None:
            node = edit.mul(edit.y, 2.0)
            del node.meta["val"]
            edit.replace(node)

    with pytest.raises(SurgeonError, match="has no metadata") as caught:
        run.apply(base, Broken())
    assert "last touched by once" in caught.value.where
    assert base.text() == before


def test_skips_have_reasons_and_all_skipped_is_an_error() -> None:
    class Narrow(Adapter):
        name: ClassVar[str] = "narrow"
        kinds: ClassVar[tuple[str, ...]] = (LINEAR,)

        def unfit(self, site: Site) -> str:
            return "too wide" if site.out > 16 else ""

    chosen, skipped = run.chosen_sites(graph_of("llama"), Narrow(targets="*.{q,k}_proj"))
    assert [site.path for site in chosen] == [f"model.layers.{i}.self_attn.k_proj" for i in range(4)]
    assert skipped == [Skip(f"model.layers.{i}.self_attn.q_proj", "too wide") for i in range(4)]
    with pytest.raises(UsageError, match="narrow has no site to work on") as caught:
        run.apply(graph_of("llama"), Narrow(targets="*.q_proj"))
    assert "too wide" in caught.value.where


def test_a_rank_above_the_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="rank 17 is above") as caught:
        run.apply(graph_of("llama"), make("lora", rank=17, targets="*.k_proj"))
    assert "[16, 32]" in caught.value.where
    assert "at most 16" in caught.value.hint


def test_nodes_that_are_missing_are_named() -> None:
    run.require_node(graph_of("llama"), ATTENTION, "prefix")
    with pytest.raises(UnsupportedError, match="prefix needs an conv1d node") as caught:
        run.require_node(graph_of("llama"), "conv1d", "prefix")
    assert "lora" in caught.value.hint


def test_structure_alone() -> None:
    bare = run.without_values(run.apply(graph_of("llama"), make("lora", rank=2)))
    assert bare.values == {}
    assert bare.inserted == {}
    assert bare.trainable()


def test_rewrites_are_done_once_per_kind_of_layer() -> None:
    count = 0

    class Counting(Once):
        def rewrite(self, edit: Edit, site: Site) -> None:
            nonlocal count
            count += 1

    run.apply(graph_of("gemma2"), Counting())
    assert count == 2 * 7 + 1
