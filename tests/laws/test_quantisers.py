"""What holds for every pass that holds weights in codes, alone and with every adapter over or under it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from benchmarks.zoo.graphs import close, graph_of, inputs_of, outputs_of, randomised
from benchmarks.zoo.oracles import exported_again
from surgeon import fold, run
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.hold import is_held
from surgeon.model import load_model
from surgeon.module import load
from surgeon.passes import PASSES, find, make
from surgeon.passes.base import EXPERTS, LINEAR, Adapter
from surgeon.passes.quantiser import Quantiser
from surgeon.quantised import WEIGHTS
from surgeon.sites import sites
from surgeon.strip import without

QUANTISERS = {
    "nf4": {}, "nf4-single": {"double": False}, "fp4": {"kind": "fp4"}, "int4": {"group": 16},
    "int3": {"bits": 3, "group": 8},
    "int2": {"bits": 2, "group": 8, "zero": "integer"}, "int8": {"bits": 8, "group": -1, "zero": "symmetric"},
}  # fmt: skip
ADAPTERS = [name for name in PASSES if issubclass(kind := find(name), Adapter) and kind.folds]
SLOW = ("nf4-single", "fp4", "int8", "gemma2", "bert")


def cases(*names: str) -> list[Any]:
    """Cases of a parametrised test; those that repeat what others show are slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


every = pytest.mark.parametrize("kind", cases(*QUANTISERS))
families = pytest.mark.parametrize("family", cases("llama", "gpt2", "gemma2", "bert"))


def step_of(kind: str) -> Quantiser:
    made = make("intq" if kind.startswith("int") else "nf4", **QUANTISERS[kind])
    assert isinstance(made, Quantiser)
    return made


def adapter(name: str) -> Adapter:
    fields = {field.name for field in dataclasses.fields(find(name))}
    own = {"targets": "all-linear"} if LINEAR in find(name).kinds else {"targets": "", "tokens": "3,4,5"}
    made = make(name, **own, **{key: value for key, value in {"rank": 3, "group": 8}.items() if key in fields})
    assert isinstance(made, Adapter)
    return made


@functools.cache
def quantised(kind: str, family: str) -> Graph:
    return run.apply(graph_of(family), step_of(kind))


class Decoded(Mapping[str, torch.Tensor]):
    """The values of a base with its quantised weights dequantised."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __getitem__(self, name: str) -> torch.Tensor:
        return fold.value_of(self.graph, name) if is_held(self.graph, name) else self.graph.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.graph.values)

    def __len__(self) -> int:
        return len(self.graph.values)


@every
@families
def test_it_computes_what_the_dequantised_weights_compute(kind: str, family: str) -> None:
    graph, base = quantised(kind, family), graph_of(family)
    plain = dataclasses.replace(base, values=Decoded(graph))
    for shape in ((2, 7), (1, 3)):
        assert close(outputs_of(graph, shape), outputs_of(plain, shape))
    assert torch.equal(outputs_of(graph, (2, 7), torch.bfloat16), outputs_of(plain, (2, 7), torch.bfloat16))
    assert not close(outputs_of(graph), outputs_of(base))
    assert sites(graph) == sites(base)


@every
@families
def test_the_weights_are_not_loaded_and_nothing_of_it_trains(kind: str, family: str) -> None:
    graph = quantised(kind, family)
    model = load(graph)
    held = [name for name in graph.tensors if is_held(graph, name)]
    assert held
    names = {name for name, _ in model.named_parameters()}
    assert not names & set(held)
    assert not graph.trainable()
    for name in held:
        holding = graph.tensors[name].held
        assert holding is not None
        for full in holding.parts.values():
            spec, tensor = graph.tensors[full], model.get_buffer(full)
            assert tuple(tensor.shape) == spec.shape
            assert spec.dtype in (None, tensor.dtype)


@every
@families
def test_taken_out_it_leaves_nothing(kind: str, family: str) -> None:
    base, graph = graph_of(family), quantised(kind, family)
    back = without(graph, {step_of(kind).name})
    assert back.text() == base.text()
    assert (back.tensors, back.inserted, back.applied) == (base.tensors, base.inserted, base.applied)
    assert [paths for _, paths in back.groups()] == [paths for _, paths in base.groups()]
    assert torch.equal(outputs_of(back), outputs_of(base))


@pytest.mark.parametrize(
    ("name", "kind", "family"),
    [
        *((name, "nf4", "llama") for name in ADAPTERS),
        ("lora", "int3", "gpt2"),
        *(
            pytest.param(name, *pair, marks=pytest.mark.slow)
            for name in ADAPTERS
            for pair in (("nf4", "gpt2"), ("int3", "gpt2"), ("int3", "llama"))
        ),
    ],
)
def test_every_adapter_stands_over_it_and_under_it(name: str, kind: str, family: str) -> None:
    base, step = graph_of(family), step_of(kind)
    over = randomised(run.apply(quantised(kind, family), adapter(name)))
    if find(name).reads_weight:
        with pytest.raises(UnsupportedError) as caught:
            run.apply(base, adapter(name), step)
        assert caught.value.hint == f"apply {step.name} before {name}"
    else:
        under = run.apply(base, adapter(name), step)
        assert close(outputs_of(dataclasses.replace(under, inserted=over.inserted)), outputs_of(over))
        assert without(under, {name}).text() == quantised(kind, family).text()
    expected = outputs_of(over)
    merged = fold.fold(over)
    assert merged.text() == base.text()
    assert merged.tensors == base.tensors
    assert close(outputs_of(merged), expected)
    assert torch.equal(outputs_of(without(over, {name})), outputs_of(quantised(kind, family)))


@pytest.mark.parametrize("kind", ["nf4", "int3"])
@pytest.mark.parametrize("name", ["prefix", "ptuning_v2", "prompt"])
def test_virtual_tokens_over_it_are_those_over_the_dequantised_weights(name: str, kind: str) -> None:
    """Prefixes and prompts touch no weight: over codes and over what they decode to they are the same, either order."""
    base, step = graph_of("llama"), make(name, tokens=3)
    over = randomised(run.apply(quantised(kind, "llama"), step))
    plain = run.apply(dataclasses.replace(base, values=Decoded(over)), step)
    expected = outputs_of(dataclasses.replace(plain, inserted={**plain.inserted, **own(over, plain)}))
    assert close(outputs_of(over), expected)
    under = run.apply(base, step, step_of(kind))
    assert close(outputs_of(dataclasses.replace(under, inserted=over.inserted)), expected)
    assert without(over, {name}).text() == quantised(kind, "llama").text()
    assert torch.equal(outputs_of(without(over, {name})), outputs_of(quantised(kind, "llama")))


def own(graph: Graph, plain: Graph) -> dict[str, Any]:
    return {full: graph.inserted[full] for full in plain.inserted}


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_experts_are_left_as_they_are_by_name(kind: str) -> None:
    base = graph_of("mixtral")
    chosen, skipped = run.chosen_sites(base, step_of(kind))
    experts = {site.path for site in sites(base, EXPERTS)}
    assert experts
    assert {skip.path for skip in skipped if "experts" in skip.why} == experts
    assert chosen
    with pytest.raises(UsageError, match="no weight to quantise") as caught:
        run.apply(base, dataclasses.replace(step_of(kind), targets="all-experts"))
    assert "linears alone, and not experts" in caught.value.where
    graph = run.apply(base, step_of(kind), adapter("lora"))
    assert close(outputs_of(without(graph, {"lora", step_of(kind).name})), outputs_of(base))


@pytest.mark.parametrize("kind", ["nf4", "int4"])
@pytest.mark.parametrize("name", ["lora", "vera", "dora"])
def test_the_gradients_are_those_of_the_dequantised_weights(kind: str, name: str) -> None:
    graph = randomised(run.apply(quantised(kind, "llama"), adapter(name)))
    plain = run.apply(dataclasses.replace(graph_of("llama"), values=Decoded(graph)), adapter(name))
    plain.inserted.update({full: graph.inserted[full] for full in plain.inserted})
    models = [load(one).train() for one in (graph, plain)]
    for model in models:
        torch.manual_seed(0)
        sum(value.square().sum() for value in model(*inputs_of(graph))).backward()
    ours, theirs = (dict(model.named_parameters()) for model in models)
    trained = [full for full, parameter in theirs.items() if parameter.requires_grad]
    assert trained
    for full in trained:
        assert (ours[full].grad - theirs[full].grad).norm() <= 1e-4 * theirs[full].grad.norm(), full


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_nothing_of_a_weight_is_kept_for_the_backward_pass(kind: str) -> None:
    graph = run.apply(quantised(kind, "llama"), adapter("lora"))
    shapes = {graph.tensors[name].shape for name in graph.tensors if is_held(graph, name)}
    kept: list[tuple[int, ...]] = []
    model = load(graph).train()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        loss = sum(value.square().sum() for value in model(*inputs_of(graph)))
        loss.backward()
    assert kept
    assert not {shape for shape in kept if shape in shapes or shape[::-1] in shapes}


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_under_autocast_it_computes_in_bf16(kind: str) -> None:
    graph = quantised(kind, "llama")
    model, inputs = load(graph), inputs_of(graph)
    with torch.no_grad():
        expected = model(*inputs)[0]
        with torch.autocast("cpu", torch.bfloat16):
            low = model(*inputs)[0]
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).abs().max() < 0.1 * expected.abs().max()


@every
@torch.no_grad()
def test_the_result_exports_again(kind: str) -> None:
    assert WEIGHTS.keys() & exported_again(quantised(kind, "llama"))


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_it_generates_with_a_cache(kind: str) -> None:
    graph = randomised(run.apply(quantised(kind, "llama"), adapter("lora")))
    model = load_model(graph)
    ids = torch.randint(3, 90, (2, 5))
    found = model.generate(ids, max_new_tokens=6, do_sample=False)
    expected = ids
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat([expected, model(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, expected)


@every
def test_what_is_quantised_is_not_quantised_again(kind: str) -> None:
    graph = quantised(kind, "llama")
    with pytest.raises(UsageError, match="already applied") as caught:
        run.apply(graph, step_of(kind))
    assert "name the adapter alone" in caught.value.hint
    other = "int4" if step_of(kind).name == "nf4" else "nf4"
    with pytest.raises(UsageError, match="no weight to quantise") as caught:
        run.apply(graph, step_of(other))
    assert "already quantised by" in caught.value.where


@every
def test_values_that_are_not_finite_are_named(kind: str) -> None:
    base = graph_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    values = dict(base.values)
    values[name] = torch.full_like(values[name], float("nan"))
    with pytest.raises(SurgeonError, match="not finite") as caught:
        load(run.apply(dataclasses.replace(base, values=values), step_of(kind)))
    assert name in caught.value.where


@pytest.mark.parametrize(("kind", "name"), [("nf4", "lora"), ("int3", "qalora")])
def test_an_adapter_over_it_learns_in_bf16_with_checkpointing(kind: str, name: str) -> None:
    graph = run.apply(quantised(kind, "llama"), adapter(name))
    model = load_model(graph).train()
    model.gradient_checkpointing_enable()
    buffers = {full: buffer.clone() for full, buffer in model.named_buffers()}
    ids = torch.randint(3, 90, (4, 9))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(buffer, buffers[full]) for full, buffer in model.named_buffers())
