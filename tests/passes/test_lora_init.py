"""First values of LoRA: against PEFT's where it draws nothing, and what holds at the first step for all of them."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import close, graph_of, inputs_of, outputs_of, randomised
from surgeon import convert, first_factors, fold, run, store
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.model import load_model
from surgeon.passes import make
from surgeon.planning import plan
from surgeon.rates import rates
from surgeon.sites import Site

quiet = pytest.mark.filterwarnings("ignore")  # PEFT's own
Q = "model.layers.0.self_attn.q_proj"
MOVING = ["pissa", "pissa_niter_4", "olora"]


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", captured)


def applied(init: str, family: str = "llama", method: str = "lora", **options: Any) -> Graph:
    step = make(method, **{"rank": 4, "alpha": 6.0, "targets": "all-linear", "init": init, **options})
    return run.apply(graph_of(family), step)


def first(graph: Graph, path: str, owner: str = "lora") -> dict[str, torch.Tensor]:
    return {word: graph.inserted[f"{path}.{owner}.{word}"]() for word in ("a", "b")}


def test_pissa_is_the_leading_part_of_the_svd_in_numpy() -> None:
    import numpy as np

    graph, s = applied("pissa", targets="q_proj"), 6 / 4
    weight = graph.values[f"{Q}.weight"].double().numpy()
    u, sigma, vt = np.linalg.svd(weight)
    p = first(graph, Q)
    expected = (u[:, :4] * sigma[:4]) @ vt[:4]
    assert np.abs(s * p["b"].double().numpy() @ p["a"].double().numpy() - expected).max() < 1e-5
    assert torch.allclose(p["a"].norm(dim=1), p["b"].norm(dim=0), rtol=1e-4)
    near = first(applied("pissa_niter_16", targets="q_proj"), Q)
    assert np.abs(s * near["b"].double().numpy() @ near["a"].double().numpy() - expected).max() < 1e-3


def test_olora_is_the_first_of_q_and_r() -> None:
    graph = applied("olora", targets="q_proj")
    p, weight = first(graph, Q), graph.values[f"{Q}.weight"]
    assert torch.allclose(p["b"].t() @ p["b"], torch.eye(4), atol=1e-5)
    assert torch.allclose(p["b"].t() @ weight, p["a"], atol=1e-5)


def test_gaussian_and_orthogonal() -> None:
    a = first(applied("gaussian", targets="up_proj", rank=16), "model.layers.0.mlp.up_proj")
    assert a["a"].std() == pytest.approx(1 / 16, rel=0.2)
    assert not a["b"].any()
    p = first(applied("orthogonal", targets="q_proj"), Q)
    assert p["a"].any()
    assert p["b"].any()
    assert (p["b"] @ p["a"]).abs().max() < 1e-6
    with pytest.raises(UsageError, match="rank 3 is odd") as caught:
        applied("orthogonal", rank=3)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("init", [*MOVING, "orthogonal", "gaussian"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_first_step_sees_the_base_and_only_a_and_b_train(init: str, method: str) -> None:
    graph = applied(init, "gpt2", method)
    assert close(outputs_of(graph), outputs_of(graph_of("gpt2")))
    assert {name.rpartition(".")[2] for name in graph.trainable()} <= {"a", "b", "m"}
    moved = randomised(graph)
    assert not close(outputs_of(moved), outputs_of(graph))
    merged = fold.fold(moved)
    assert close(outputs_of(merged), outputs_of(moved))
    assert merged.tensors == graph_of("gpt2").tensors
    assert fold.without(moved, {method}).text() == graph_of("gpt2").text()


def test_what_the_frozen_pair_costs_is_planned() -> None:
    step = make("lora", rank=4, init="pissa", targets="all-linear")
    planned, graph = plan(graph_of("llama"), step), run.apply(graph_of("llama"), step)
    plain = plan(graph_of("llama"), dataclasses.replace(step, init="kaiming"))  # type: ignore[call-arg]
    inserted = {name: spec for name, spec in graph.tensors.items() if spec.owner}
    assert planned.trainable_parameters == plain.trainable_parameters
    assert planned.stored_parameters == 2 * plain.stored_parameters == sum(s.count for s in inserted.values())
    assert set(rates(run.apply(graph_of("llama"), make("lora", init="olora", rank=2, lr_ratio=4)), 1.0).values()) == {4}


@quiet
@pytest.mark.parametrize("init", MOVING)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_loads_a_plain_lora_of_twice_the_rank(init: str, method: str, tmp_path: Path) -> None:
    folder, base = base_of("llama")
    options: dict[str, Any] = {"targets": "q_proj down_proj", "ranks": {"down_proj": 2}, "rslora": init == "olora"}
    graph = randomised(run.apply(base, make(method, rank=4, init=init, **options)), std=0.05)
    store.save(graph, tmp_path / "work")
    again = store.load(tmp_path / "work")
    assert again.applied == graph.applied
    assert all(torch.equal(again.inserted[name](), graph.inserted[name]()) for name in graph.inserted)
    assert close(outputs_of(store.load_adapter(tmp_path / "work")), outputs_of(graph))
    model = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    inputs = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    with torch.no_grad():
        assert close(load_model(graph)(**inputs).logits, model(**inputs).logits)  # type: ignore[arg-type]


def test_a_file_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    graph = run.apply(base_of("llama")[1], make("lora", rank=2, init="pissa", targets="q_proj"))
    place = store.save(graph, tmp_path / "work") / "adapter_model.safetensors"
    tensors = load_file(place)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, place)
    with pytest.raises(UsageError, match="differ in"):
        store.load(tmp_path / "work")


@quiet
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_peft_saved_unconverted_is_computed_again(init: Any, dora: bool, tmp_path: Path) -> None:
    folder, _ = base_of("llama")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init, use_dora=dora
    )
    model = peft.get_peft_model(reference(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "theirs")
    graph = store.load_adapter(tmp_path / "theirs", folder)
    inputs = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    with torch.no_grad():
        assert close(load_model(graph)(**inputs).logits, model.eval()(**inputs).logits)  # type: ignore[arg-type]
    whole = model.merge_and_unload().get_submodule(Q).weight
    assert close(fold.fold(graph).values[f"{Q}.weight"], whole)


def test_it_converts_to_lora_exactly() -> None:
    made = convert.to_lora(randomised(applied("pissa", targets="q_proj")))
    assert made.exact
    assert {site.rank for site in made.sites} == {8}


def test_loftq_makes_up_for_what_quantising_took() -> None:
    quantised = run.apply(graph_of("llama"), make("nf4"))
    start = run.apply(quantised, make("lora", rank=8, init="loftq", targets="all-linear"))
    plain, mended, exact = (outputs_of(graph) for graph in (quantised, start, graph_of("llama")))
    assert (mended - exact).norm() < 0.8 * (plain - exact).norm()
    weight, merged = graph_of("llama").values[f"{Q}.weight"], fold.fold(start).values[f"{Q}.weight"]
    residual = weight - fold.value_of(quantised, f"{Q}.weight")
    left = torch.linalg.svdvals(residual)[8:].norm()
    assert (weight - merged).norm() == pytest.approx(float(left), rel=1e-4)
    with pytest.raises(UsageError, match="no site to work on") as caught:
        applied("loftq")
    assert "not quantised" in str(caught.value)


ROUNDS = 3


def pefts_loftq(weight: torch.Tensor, rank: int, rounds: int = ROUNDS) -> tuple[torch.Tensor, ...]:
    """PEFT's own function, which names a GPU as the place to compute, on the CPU."""
    from peft.utils import loftq_utils

    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    space = dict(vars(loftq_utils))
    exec(source, space)
    found: tuple[torch.Tensor, ...] = space["loftq_init"](weight, num_bits=4, reduced_rank=rank, num_iter=rounds)
    return found


@quiet
def test_rounds_of_loftq_are_pefts() -> None:
    """On a weight of whole blocks per row: bitsandbytes 0.50 decodes some others wrongly on the CPU."""
    weight, site = torch.randn(48, 128), Site("q", "linear", "", "q", inp=128, out=48)
    codes = make("nf4", double=False)
    before, (a, b) = first_factors.loftq(weight, 4, ROUNDS, lambda m: codes.decode(codes.encode(m), site))  # type: ignore[attr-defined]
    moved, their_a, their_b = pefts_loftq(weight, 4)
    base = codes.decode(codes.encode(weight - before[1] @ before[0]), site)  # type: ignore[attr-defined]
    assert torch.allclose(base, moved, atol=1e-6)
    assert torch.allclose(b @ a, their_b @ their_a, atol=1e-5)
    once = pefts_loftq(weight, 4, 1)
    assert (weight - base - b @ a).norm() < (weight - once[0] - once[2] @ once[1]).norm()


@pytest.mark.parametrize("codes", [("intq", {"bits": 4}), ("intq", {"bits": 3, "zero": "symmetric"})])
def test_rounds_of_loftq_are_the_formula_in_numpy(codes: tuple[str, dict[str, Any]]) -> None:
    import numpy as np

    quantiser = make(codes[0], **codes[1])
    graph = run.apply(graph_of("llama"), quantiser, make("lora", rank=4, init="loftq_iter_2", targets="q_proj"))
    item = next(item for item in fold.folds(graph) if item.site.path == Q)
    weight, product = graph.values[f"{Q}.weight"].numpy(), 0
    for _ in range(2):
        codes_ = quantiser.encode(torch.from_numpy(weight - product))  # type: ignore[attr-defined]
        rounded = quantiser.decode(codes_, item.site).numpy()  # type: ignore[attr-defined]
        u, sigma, vt = np.linalg.svd(weight - rounded)
        product = (u[:, :4] * sigma[:4]) @ vt[:4]
    p = first(graph, Q)
    assert np.abs(fold.value_of(graph, f"{Q}.weight").numpy() - rounded).max() < 1e-6
    assert np.abs(16 / 4 * (p["b"] @ p["a"]).numpy() - product).max() < 1e-5


def test_codes_of_loftq_come_back_from_a_folder(tmp_path: Path) -> None:
    steps = make("nf4"), make("lora", rank=2, init="loftq_iter_2", targets="q_proj down_proj")
    planned = plan(base_of("llama")[1], *steps)
    graph = randomised(run.apply(base_of("llama")[1], *steps))
    assert planned.trainable_parameters == sum(spec.count for spec in graph.trainable().values())
    store.save(graph, tmp_path / "work")
    assert not (tmp_path / "work" / "adapter_config.json").exists()
    again = store.load(tmp_path / "work")
    assert torch.equal(outputs_of(again), outputs_of(graph))
    assert all(torch.equal(again.inserted[name](), graph.inserted[name]()) for name in graph.inserted)
    assert close(outputs_of(fold.fold(again)), outputs_of(graph))


@pytest.mark.parametrize(
    ("method", "init"),
    [
        ("lora", "pizza"),
        ("lora", "loftq_iter_0"),
        ("lora", "pissa_niter_x"),
        ("dylora", "pissa"),
        ("adalora", "gaussian"),
    ],
)
def test_what_is_no_init_is_refused(method: str, init: str) -> None:
    with pytest.raises(UsageError, match="init is") as caught:
        make(method, init=init)
    assert "kaiming" in caught.value.hint


def test_embeddings_have_no_such_first_values() -> None:
    with pytest.raises(UsageError, match="no site to work on") as caught:
        applied("pissa", targets="embed_tokens")
    assert "whole linears" in str(caught.value)


@quiet
def test_other_moved_bases_are_refused_by_name(tmp_path: Path) -> None:
    from surgeon.passes.lora import Lora

    for config in ({"init_lora_weights": "corda"}, {"init_lora_weights": "olora", "fan_in_fan_out": True}):
        with pytest.raises(UnsupportedError, match="init_lora_weights"):
            Lora.from_peft(config)


def test_the_randomised_svd_needs_few_rounds() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 6, generator=generator) @ torch.randn(6, 30, generator=generator)
    a, b = first_factors.principal(matrix, 6, 1, generator)
    assert torch.allclose(b @ a, matrix, atol=1e-4)
