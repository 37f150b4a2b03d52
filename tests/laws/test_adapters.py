"""Laws that every registered adapter obeys: inserted, trained, merged, counted, exported, stacked."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.zoo.graphs import close, graph_of, inputs_of, outputs_of, randomised
from benchmarks.zoo.oracles import exported_again
from surgeon import fold, run
from surgeon.errors import SurgeonError, UsageError
from surgeon.graph import Graph
from surgeon.module import load
from surgeon.passes import PASSES, find, make
from surgeon.passes.base import Adapter
from surgeon.planning import plan
from surgeon.sites import LINEAR, sites

FAMILIES = ("llama", "gpt2", "gemma2", "bert")
ADAPTERS = [name for name in PASSES if (kind := find(name)) and issubclass(kind, Adapter) and kind.folds]
SHAPES = ((2, 7), (1, 3))
LINEARS = [name for name in ADAPTERS if LINEAR in find(name).kinds]
TOKENS = ",".join(str(int(token)) for token in inputs_of(graph_of("llama"))[0][0, :3])
every = pytest.mark.parametrize("name", ADAPTERS)
on_linears = pytest.mark.parametrize("name", LINEARS)
everywhere = pytest.mark.parametrize("family", FAMILIES)


def small(name: str, targets: str = "all-linear", **options: Any) -> Adapter:
    """The pass with options that fit tiny layers."""
    fields = {field.name for field in dataclasses.fields(find(name))}
    if name not in LINEARS and targets == "all-linear":
        targets = ""
    own = {key: value for key, value in {"rank": 3, "tokens": TOKENS, "group": 8}.items() if key in fields}
    if name == "qalora":
        own["alpha"] = 2.0  # it reads sums of 8 inputs
    made = make(name, targets=targets, **options, **own)
    assert isinstance(made, Adapter)
    return made


@functools.cache
def applied(name: str, family: str) -> Graph:
    return run.apply(graph_of(family), small(name))


def fingerprint(graph: Graph) -> Any:
    """Everything a rewrite could have touched: the node objects, what they read, and their metadata."""
    nodes = [
        (
            id(node),
            node.name,
            node.op,
            str(node.target),
            str(node.args),
            str(node.kwargs),
            list(node.users),
            sorted(node.meta),
        )
        for part, _ in graph.parts()
        for node in part.nodes
    ]
    return (
        graph.text(),
        nodes,
        dict(graph.tensors),
        dict(graph.ties),
        dict(graph.inserted),
        graph.applied,
        graph.outputs,
    )


@every
@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_keeps_what_it_promises(name: str, family: str, dtype: torch.dtype) -> None:
    step, base, graph = small(name), graph_of(family), applied(name, family)
    if dtype != torch.float32:  # a base that is stored in this dtype, and not rounded after the first values were made
        stored = {n: base.values[n].to(dtype) for n, spec in base.tensors.items() if spec.parameter}
        base = dataclasses.replace(base, values={**base.values, **stored})
        graph = run.apply(base, step)
    for shape in SHAPES:
        before, after = (outputs_of(one, shape, dtype) for one in (base, graph))
        if step.keeps == "exact":
            assert torch.equal(before, after)
        elif step.keeps == "close":
            assert (before - after).abs().max() <= 2 * torch.finfo(dtype).eps * before.abs().max()
        else:
            assert after.isfinite().all()


@every
@everywhere
def test_exactly_the_declared_parameters_train(name: str, family: str) -> None:
    graph = applied(name, family)
    model = load(randomised(graph)).train()
    trained = {full for full, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(graph.trainable())
    assert {graph.tensors[full].owner for full in trained} == {name}
    sum(value.square().sum() for value in model(*inputs_of(graph))).backward()
    for full, parameter in model.named_parameters():
        if full in trained:
            assert parameter.grad is not None, full
            assert parameter.grad.abs().max() > 0, full
        else:
            assert parameter.grad is None, full


@every
@everywhere
def test_merging_changes_nothing_and_leaves_nothing(name: str, family: str) -> None:
    base = graph_of(family)
    trained = randomised(applied(name, family))
    expected = outputs_of(trained)
    assert (expected - outputs_of(base)).abs().max() > 1e-2
    merged = fold.fold(trained)
    assert merged.text() == base.text()
    assert merged.tensors == base.tensors
    assert merged.applied == ()
    assert merged.inserted == base.inserted
    assert [len(paths) for _, paths in merged.groups()] == [len(paths) for _, paths in base.groups()]
    for shape in SHAPES:
        assert close(outputs_of(merged, shape), outputs_of(trained, shape))


@every
@everywhere
def test_the_graph_it_is_given_stays(name: str, family: str) -> None:
    base = graph_of(family)
    before = fingerprint(base)
    once = run.apply(base, small(name))
    middle = fingerprint(once)
    if find(name).stacks:
        run.apply(once, small(name))
    fold.fold(once)
    assert fingerprint(base) == before
    assert fingerprint(once) == middle


@every
@everywhere
def test_a_target_that_matches_nothing_names_a_real_path(name: str, family: str) -> None:
    base = graph_of(family)
    real = [site.path for site in sites(base, *find(name).kinds)]
    near = next((path for path in real if path.endswith(("q_proj", "c_attn", "query"))), real[0])
    for dead in (near[:-1] + "x", "*." + near.rpartition(".")[2] + "z"):
        with pytest.raises(UsageError, match="no module matches") as caught:
            run.apply(base, small(name, dead))
        assert any(f"'{path}'" in caught.value.hint for path in real), caught.value.hint
        assert near.rpartition(".")[2] in caught.value.hint
    with pytest.raises(UsageError, match="no site to work on"):
        run.apply(base, small(name, near, exclude="*"))


@every
@everywhere
def test_applied_twice_it_stacks_or_is_refused(name: str, family: str) -> None:
    once = applied(name, family)
    if not find(name).stacks:
        with pytest.raises(UsageError, match="already applied"):
            run.apply(once, small(name))
        return
    twice = randomised(run.apply(once, small(name)))
    assert {spec.owner for spec in twice.trainable().values()} == {name, f"{name}_2"}
    assert len(twice.trainable()) == 2 * len(once.trainable())
    merged = fold.fold(twice)
    assert merged.text() == graph_of(family).text()
    assert close(outputs_of(merged), outputs_of(twice))


@every
@everywhere
def test_planned_counts_are_the_measured_ones(name: str, family: str) -> None:
    graph, planned = applied(name, family), plan(graph_of(family), small(name))
    model = load(graph)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    specs = {name: spec for name, spec in graph.tensors.items() if spec.owner}
    inserted = [model.get_parameter(n) if s.parameter else model.get_buffer(n) for n, s in specs.items()]
    stored = [tensor for tensor, spec in zip(inserted, specs.values(), strict=True) if spec.persistent]
    assert planned.trainable_parameters == sum(parameter.numel() for parameter in trained)
    assert planned.stored_parameters == sum(tensor.numel() for tensor in stored)
    assert planned.bytes.adapter == sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert planned.bytes.gradients == sum(parameter.numel() * parameter.element_size() for parameter in trained)
    assert planned.base_parameters == sum(p.numel() for n, p in load(graph_of(family)).named_parameters())
    assert planned.site_count == len(planned.sites) == len({n.rpartition(".")[0] for n in graph.trainable()})


@every
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_the_result_exports_again(name: str, family: str) -> None:
    kept = exported_again(randomised(applied(name, family)))
    assert torch.ops.aten.linear.default in kept or torch.ops.aten.addmm.default in kept
    assert torch.ops.surgeon.attention.default in kept


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(ADAPTERS, 2)) or [("lora", "lora")])
@everywhere
def test_ordered_pairs_compose_or_are_refused(first: str, second: str, family: str) -> None:
    base = graph_of(family)
    reason: tuple[str, ...] = ()
    try:
        both = randomised(run.apply(base, small(first), small(second)), std=0.1)
    except SurgeonError as error:
        reason = (error.what, error.where, error.hint)
    if reason:
        assert all(reason)
        return
    assert [step.name for step in both.applied] == [first, second]
    merged = fold.fold(both)
    assert merged.text() == base.text()
    assert close(outputs_of(merged), outputs_of(both))
    one_less = fold.without(both, {first})
    assert one_less.text() == run.apply(base, small(second)).text()
    assert {spec.owner for spec in one_less.tensors.values()} == {"", second}
    assert one_less.applied == (both.applied[1],)


@every
@everywhere
def test_layers_rewritten_alike_still_share_one_graph(name: str, family: str) -> None:
    base, graph = graph_of(family), applied(name, family)
    assert [paths for _, paths in graph.groups()] == [paths for _, paths in base.groups()]


@on_linears
def test_a_layer_that_is_targeted_alone_is_split_off(name: str) -> None:
    base = graph_of("llama")
    graph = run.apply(base, small(name, "model.layers.{0,2}.self_attn.q_proj model.layers.1.mlp.up_proj"))
    layers = [f"model.layers.{i}" for i in range(4)]
    assert sorted(paths for _, paths in graph.groups()) == [[layers[0], layers[2]], [layers[1]], [layers[3]]]
    assert graph.layers[layers[3]] is base.layers[layers[3]]
    trained = randomised(graph)
    assert close(outputs_of(fold.fold(trained)), outputs_of(trained))
    assert fold.fold(trained).text() == base.text()
    assert fold.fold(trained).layers == base.layers
    if find(name).stacks:
        again = run.apply(graph, small(name))
        assert len(again.groups()) == 3


@pytest.mark.parametrize("name", [n for n in ADAPTERS if hasattr(step := find(n)(), "ranks") and not step.any_rank])
def test_a_rank_pattern_splits_exactly_the_layers_it_must(name: str) -> None:
    base = graph_of("llama")
    graph = run.apply(base, small(name, ranks=(("model.layers.1.*.q_proj", 5), ("*.k_proj", 2))))
    layers = [f"model.layers.{i}" for i in range(4)]
    assert sorted(paths for _, paths in graph.groups()) == [[layers[0], layers[2], layers[3]], [layers[1]]]
    rank = {n: s.shape[0] for n, s in graph.trainable().items() if n.endswith(".a")}
    for full, found in rank.items():
        wanted = 5 if "layers.1." in full and "q_proj" in full else 2 if "k_proj" in full else 3
        assert found == wanted, full
    trained = randomised(graph)
    assert close(outputs_of(fold.fold(trained)), outputs_of(trained))


@every
def test_first_values_depend_on_the_seed_and_the_name_alone(name: str) -> None:
    base = graph_of("llama")

    def values(**options: Any) -> dict[str, torch.Tensor]:
        graph = run.apply(base, small(name, **options.pop("pass_options", {})), **options)
        return {full: graph.inserted[full]() for full in graph.trainable()}

    targets = "*.q_proj" if name in LINEARS else ""
    once, again, few = values(seed=3), values(seed=3), values(seed=3, pass_options={"targets": targets})
    assert all(torch.equal(once[full], again[full]) for full in once)
    assert all(torch.equal(once[full], few[full]) for full in few)


@on_linears
def test_only_linears_are_meant_by_all_linear(name: str) -> None:
    for family, head in (("llama", "lm_head"), ("bert", "classifier")):
        chosen, _ = run.chosen_sites(graph_of(family), small(name))
        everything = {site.path for site in sites(graph_of(family), LINEAR)}
        assert {site.path for site in chosen} == everything - {head}


def test_the_laws_are_asked_of_someone() -> None:
    check: Callable[[str], Any] = ADAPTERS.index
    assert check("lora") >= 0
    assert check("vera") >= 0
