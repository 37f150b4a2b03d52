"""Laws that every adapter obeys that no weight can hold: columns at attentions, rows before tokens."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch

from benchmarks.zoo.graphs import close, graph_of, inputs_of, outputs_of, randomised
from benchmarks.zoo.oracles import exported_again
from surgeon import fold, run
from surgeon.errors import SurgeonError, UsageError
from surgeon.finalise import finalise
from surgeon.graph import Graph
from surgeon.module import load
from surgeon.passes import PASSES, find, make
from surgeon.passes.base import EMBEDDING, LINEAR, Adapter
from surgeon.planning import plan

METHODS = {name: kind for name in PASSES if issubclass(kind := find(name), Adapter)}
VIRTUAL = [name for name, kind in METHODS.items() if not kind.folds]
FOLDING = [name for name, kind in METHODS.items() if kind.folds]
WITH_HEAD = ("ptuning_v2",)
FAMILIES = {name: ("bert",) if name in WITH_HEAD else ("gemma2", "bart", "bert") for name in VIRTUAL}
CASES = [(name, family) for name in VIRTUAL for family in FAMILIES[name]]
TOKENS = ",".join(str(int(token)) for token in inputs_of(graph_of("bert"))[0][0, :3])
every = pytest.mark.parametrize("name", VIRTUAL)
everywhere = pytest.mark.parametrize(("name", "family"), CASES)


def small(name: str, **options: Any) -> Adapter:
    """The method with options that fit tiny models."""
    fields = {field.name for field in dataclasses.fields(find(name))}
    sizes = {"tokens": 3, "rank": 3} if name in VIRTUAL else {"rank": 3, "targets": "all-linear", "tokens": TOKENS}
    drawn = {"init": "normal"} if name in VIRTUAL else {}
    if EMBEDDING in find(name).kinds and LINEAR not in find(name).kinds:
        sizes.pop("targets", None)
    given = {key: value for key, value in {**sizes, **drawn, **options}.items() if key in fields}
    made = make(name, **given)
    assert isinstance(made, Adapter)
    return made


@functools.cache
def applied(name: str, family: str) -> Graph:
    return run.apply(graph_of(family), small(name))


def composed(base: Graph, first: str, second: str) -> Graph | None:
    """Two methods, one after the other; None if that is refused, with a reason."""
    reason: tuple[str, ...] = ()
    try:
        return run.apply(base, small(first), small(second))
    except SurgeonError as error:
        reason = (error.what, error.where, error.hint)
    assert all(reason)
    return None


def rounding(graph: Graph) -> float:
    """How far the outputs move, in fp64, when every weight of the base moves by half a unit of fp32's last place.

    Large values of a prefix saturate a softmax, and what stands behind it makes much of the last bit: BART a hundred
    times as much as others. A merge rounds each weight once, and may not do worse than a few such moves.
    """
    generator, moved = torch.Generator().manual_seed(0), {}
    for name, spec in graph.tensors.items():
        if not spec.owner and (value := graph.values[name]).is_floating_point():
            up = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
            moved[name] = value.double() * (1 + up * 2.0**-24)
    values = {name: graph.values[name] for name in graph.tensors if name not in moved and name in graph.values} | moved
    exact, other = (outputs_of(g, dtype=torch.float64) for g in (graph, dataclasses.replace(graph, values=values)))
    return float((other - exact).abs().max() / exact.abs().max())


@everywhere
def test_it_changes_the_model_and_leaves_its_shapes(name: str, family: str) -> None:
    base, graph = graph_of(family), applied(name, family)
    for shape in ((2, 7), (1, 3)):
        before, after = outputs_of(base, shape), outputs_of(graph, shape)
        assert before.shape == after.shape
        assert (before - after).abs().max() > 1e-3
        assert (outputs_of(graph, shape, torch.bfloat16) - after).abs().max() <= 0.1 * after.abs().max()


@everywhere
def test_exactly_the_declared_parameters_train(name: str, family: str) -> None:
    graph = applied(name, family)
    model = load(randomised(graph)).train()
    sum(value.square().sum() for value in model(*inputs_of(graph))).backward()
    trained = {full for full, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(graph.trainable())
    for full, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (full in trained), full


@everywhere
def test_taken_out_it_leaves_nothing(name: str, family: str) -> None:
    base = graph_of(family)
    before, graph = base.text(), applied(name, family)
    bare = fold.without(graph, {name})
    assert base.text() == before == bare.text()
    assert {full for full, spec in bare.tensors.items() if spec.owner} == set()
    assert [len(paths) for _, paths in bare.groups()] == [len(paths) for _, paths in base.groups()]
    assert sum(len(part.nodes) for part, _ in bare.parts()) == sum(len(part.nodes) for part, _ in base.parts())


@everywhere
def test_layers_rewritten_alike_still_share_one_graph(name: str, family: str) -> None:
    assert [paths for _, paths in applied(name, family).groups()] == [paths for _, paths in graph_of(family).groups()]


@everywhere
def test_alone_it_has_nothing_to_merge_and_a_final_form(name: str, family: str) -> None:
    trained = randomised(applied(name, family))
    with pytest.raises(UsageError, match="no adapter to merge"):
        fold.fold(trained)
    assert close(outputs_of(finalise(trained)), outputs_of(trained))


@everywhere
def test_planned_counts_are_the_measured_ones(name: str, family: str) -> None:
    graph, planned = applied(name, family), plan(graph_of(family), small(name))
    trained = [spec.count for spec in graph.trainable().values()]
    inserted = [spec.count for spec in graph.tensors.values() if spec.owner]
    head = sum(spec.count for spec in graph.trainable().values() if not spec.owner)
    assert planned.trainable_parameters == sum(trained)
    assert planned.stored_parameters == sum(inserted) + head
    assert planned.site_count == len(fold.rest(graph))


@everywhere
def test_applied_twice_it_stacks_or_is_refused(name: str, family: str) -> None:
    once = applied(name, family)
    if not find(name).stacks:
        with pytest.raises(UsageError, match="already applied"):
            run.apply(once, small(name))
        return
    twice = randomised(run.apply(once, small(name, tokens=2)))
    assert {spec.owner for spec in twice.trainable().values() if spec.owner} == {name, f"{name}_2"}
    assert outputs_of(twice).isfinite().all()
    assert fold.without(twice, {f"{name}_2"}).text() == once.text()
    alone = run.apply(graph_of(family), small(name, tokens=2)).text()
    assert fold.without(twice, {name}).text().replace(f".{name}_2.", f".{name}.") == alone


@every
@torch.no_grad()
def test_the_result_exports_again(name: str) -> None:
    assert exported_again(randomised(applied(name, FAMILIES[name][0])))


@every
def test_first_values_depend_on_the_seed_and_the_name_alone(name: str) -> None:
    def values(seed: int) -> dict[str, torch.Tensor]:
        graph = run.apply(graph_of("bert"), small(name), seed=seed)
        return {full: graph.inserted[full]() for full, spec in graph.trainable().items() if spec.owner}

    once, again, other = values(3), values(3), values(4)
    assert all(torch.equal(once[full], again[full]) and not torch.equal(once[full], other[full]) for full in once)


BESIDE = [pair for one in VIRTUAL for two in FOLDING for pair in ((one, two), (two, one))]


@pytest.mark.parametrize(("first", "second"), BESIDE, ids=lambda name: name)
def test_what_folds_beside_it_folds_and_it_stays(first: str, second: str) -> None:
    stays, folds = (first, second) if first in VIRTUAL else (second, first)
    for family in FAMILIES[stays][:2]:
        base = graph_of(family)
        both = composed(base, first, second)
        if both is None:
            continue
        both = randomised(both)
        assert [step.name for step in both.applied] == [first, second]
        merged = fold.fold(both)
        exact = outputs_of(both, dtype=torch.float64)
        error = (outputs_of(merged, dtype=torch.float64) - exact).abs().max() / exact.abs().max()
        assert error <= 2e-6 or error <= 16 * rounding(merged)
        assert merged.text() == applied(stays, family).text() == fold.without(both, {folds}).text()
        assert fold.without(both, {stays}).text() == run.apply(base, small(folds)).text()


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(VIRTUAL, 2)), ids=lambda name: name)
def test_two_of_them_compose_in_either_order_or_are_refused(first: str, second: str) -> None:
    families = [family for family in FAMILIES[first] if family in FAMILIES[second]]
    for family in families:
        base = graph_of(family)
        both, turned = composed(base, first, second), composed(base, second, first)
        if both is None or turned is None:
            continue
        both = randomised(both)
        assert set(both.trainable()) == set(turned.trainable())
        assert fold.without(both, {first}).text() == applied(second, family).text()
        assert fold.without(both, {second}).text() == applied(first, family).text()
        if "prompt" in (first, second):  # two sets of columns are seen alike, but not in one place
            turned.inserted.update(both.inserted)
            assert close(outputs_of(turned), outputs_of(both))


def test_the_laws_are_asked_of_someone() -> None:
    assert {"prefix", "prompt"} <= set(VIRTUAL)
    assert {"lora", "vera"} <= set(FOLDING)
