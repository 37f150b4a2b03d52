from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import close, graph_of, inputs_of, model_of, outputs_of, randomised
from benchmarks.zoo.oracles import assert_merged_alike, losses_on
from surgeon import convert, fold, run, store
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.model import load_model
from surgeon.module import load
from surgeon.normal import Base
from surgeon.passes import make
from surgeon.passes.dora import Dora

quiet = pytest.mark.filterwarnings("ignore")  # PEFT's own


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", captured)


def applied(family: str = "llama", **options: Any) -> Graph:
    return run.apply(graph_of(family), make("dora", **{"rank": 3, "targets": "all-linear", **options}))


def test_it_is_the_formula_in_numpy() -> None:
    rng = np.random.default_rng(0)
    for item in fold.folds(randomised(applied(alpha=4.0)))[:7]:
        a, b, m = (item.params[name]().double().numpy() for name in "abm")
        x, weight = rng.normal(size=(4, item.site.inp)), rng.normal(size=(item.site.out, item.site.inp))
        direction = weight + 4 / 3 * b @ a
        expected = x @ (m[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)).T
        found = x @ item.normal(Base(lambda w=weight: torch.from_numpy(w))).merged(torch.from_numpy(weight)).numpy().T  # type: ignore[misc]
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", "all-linear"), ("gpt2", "c_attn wte"), ("bert", "query word_embeddings"), ("gemma2", "embed_tokens")],
)
def test_the_graph_computes_it(family: str, targets: str) -> None:
    """Against transformers with every targeted module's weight replaced by the merged one."""
    import copy

    graph = randomised(applied(family, targets=targets))
    model = copy.deepcopy(model_of(family))
    for item in fold.folds(graph):
        p = {name: tensor.double() for name, tensor in item.tensors().items()}
        weight = model.get_submodule(item.site.path).weight
        assert isinstance(weight, torch.Tensor)
        direction = item.site.matrix(weight.detach().double()) + 16 / 3 * p["b"] @ p["a"]
        made = p["m"][:, None] * direction / direction.norm(dim=1, keepdim=True)
        apart = torch.nn.Parameter(item.site.stored(made).float())
        model.get_submodule(item.site.path).weight = apart  # a tied head keeps the old one
    with torch.no_grad():
        expected = model(**dict(zip(graph.inputs, inputs_of(graph), strict=True))).logits.flatten()
    assert close(outputs_of(graph)[: len(expected)], expected)


def test_magnitudes_begin_as_the_norms_of_the_weight() -> None:
    graph = applied("gpt2", targets="c_attn wte")
    weight = graph.values["transformer.h.0.attn.c_attn.weight"]
    assert torch.equal(graph.inserted["transformer.h.0.attn.c_attn.dora.m"](), weight.t().norm(dim=1))
    assert graph.tensors["transformer.wte.dora.m"].shape == (graph.values["transformer.wte.weight"].shape[1],)


def test_a_row_of_zeros_stays_finite() -> None:
    graph = graph_of("llama").copy()
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = graph.values[name].clone()
    weight[1] = 0
    graph.values = {**graph.values, name: weight}
    made = run.apply(graph, make("dora", rank=2, targets="q_proj"))
    assert torch.equal(outputs_of(made).isfinite(), torch.ones_like(outputs_of(made), dtype=torch.bool))
    assert fold.fold(made).values[name].isfinite().all()


def gradients(model: torch.nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    result = model(*inputs)[0] if isinstance(inputs, list) else model(**inputs).logits
    result.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@quiet
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients_in_training_are_pefts(dropout: float, tmp_path: Path) -> None:
    folder, base = base_of("llama")
    options: dict[str, Any] = {"rank": 3, "targets": "model.layers.1.self_attn.q_proj", "dropout": dropout}
    graph = randomised(run.apply(base, make("dora", **options)))
    store.save(graph, tmp_path / "work")
    theirs = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work", is_trainable=True).train()
    ours = load(graph).train()
    expected = gradients(theirs, dict(zip(graph.inputs, inputs_of(graph), strict=True)))
    found = gradients(ours, inputs_of(graph))
    keys = {"a": "lora_A.default.weight", "b": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
    for word, key in keys.items():
        name = "model.layers.1.self_attn.q_proj"
        assert close(found[f"{name}.dora.{word}"], expected[f"base_model.model.{name}.{key}"]), word


WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"targets": "*.{q,down}_proj", "rslora": True, "ranks": {"q_proj": 2}}),
    "gpt2": ("gpt2", {"targets": "c_attn wpe", "bias": "all"}),
    "bert": ("bert", {"targets": "query word_embeddings", "modules_to_save": "classifier"}),
}


@quiet
@pytest.mark.parametrize("case", WRITTEN)
def test_peft_loads_and_merges_what_surgeon_writes(case: str, tmp_path: Path) -> None:
    family, options = WRITTEN[case]
    folder, base = base_of(family)
    graph = randomised(run.apply(base, make("dora", rank=3, **options)))
    store.save(graph, tmp_path / "work")
    again = store.load_adapter(tmp_path / "work")
    assert again.text() == graph.text()
    assert all(torch.equal(again.inserted[name](), graph.inserted[name]()) for name in graph.inserted)
    model = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    inputs = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    with torch.no_grad():
        assert close(load_model(graph)(**inputs).logits, model(**inputs).logits)  # type: ignore[arg-type]
    assert_merged_alike(model, graph)


@quiet
@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "embed_tokens"]), ("gpt2", ["c_fc", "wte"])])
def test_surgeon_loads_what_peft_writes(family: str, targets: list[str], tmp_path: Path) -> None:
    folder, _ = base_of(family)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=True, fan_in_fan_out=family == "gpt2")
    model = peft.get_peft_model(reference(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    graph = store.load_adapter(tmp_path / "theirs", folder)
    assert isinstance(graph.applied[0], Dora)
    assert_merged_alike(model.eval(), graph)


def test_it_converts_to_lora_with_the_error_that_a_rank_has() -> None:
    graph = randomised(applied(targets="q_proj"))
    with pytest.raises(UnsupportedError, match="no low rank is exact"):
        convert.to_lora(graph)
    whole = convert.to_lora(graph, rank=32)
    assert max(site.error for site in whole.sites) < 1e-6
    assert close(outputs_of(whole.graph), outputs_of(graph))
    part = convert.to_lora(graph, rank=4)
    assert all(0 < site.error < 1 and site.rank == 4 for site in part.sites)


def test_what_another_adapter_has_changed_is_refused() -> None:
    below = run.apply(graph_of("llama"), make("lora", rank=2, targets="q_proj"))
    with pytest.raises(UnsupportedError, match="reads the weight of a layer") as caught:
        run.apply(below, make("dora", rank=2, targets="q_proj"))
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(UsageError, match="already applied"):
        run.apply(applied(), make("dora"))


def test_the_first_step_sees_the_base_to_the_bit() -> None:
    for family, targets in (("llama", "all-linear"), ("gpt2", "all-linear"), ("gpt2", "wte wpe")):
        assert torch.equal(outputs_of(applied(family, targets=targets)), outputs_of(graph_of(family)))


@torch.no_grad()
def test_a_bf16_base_keeps_its_function() -> None:
    before, after = outputs_of(graph_of("llama"), dtype=torch.bfloat16), outputs_of(applied(), dtype=torch.bfloat16)
    assert (before - after).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * before.abs().max()


def test_no_second_weight_is_made() -> None:
    """Nothing that is written into the graph has the size of W."""
    graph = applied(targets="up_proj")
    part = graph.layers["model.layers.0"]
    sizes = [tuple(n.meta["val"].shape) for n in part.nodes if n.meta.get("surgeon") and n.op == "call_function"]
    assert (48, 32) not in sizes
    assert (32, 48) not in sizes


def test_it_learns_four_points() -> None:
    model = load_model(applied(rank=8)).train()
    ids = torch.randint(3, 112, (4, 6), generator=torch.Generator().manual_seed(0))
    losses = losses_on(model, ids, lr=0.02, steps=40)
    assert losses[-1] < 0.2 * losses[0]
    assert close(outputs_of(fold.fold(model.trained())), outputs_of(model.trained()))
