"""LoRA with a rank for each part of a fused projection: the paper's MergedLinear, for any layout of its outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import close, graph_of, inputs_of, outputs_of, randomised
from benchmarks.zoo.oracles import merged_pairs
from surgeon import fold, run, store
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.module import load
from surgeon.normal import Base
from surgeon.passes import make
from surgeon.planning import plan

NOTHING = Base(lambda: torch.empty(0))
# Where q's, k's and v's outputs are, as each family's code splits them (4 heads of 8, 2 K/V heads; 4 of GPT-2).
HEADS = np.arange(96).reshape(4, 3, 8)
GROUPS = np.arange(64).reshape(2, 4, 8)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("c_attn", {"q": np.arange(32), "k": np.arange(32, 64), "v": np.arange(64, 96)}),
    "phi3": ("qkv_proj", {"q": np.arange(32), "k": np.arange(32, 48), "v": np.arange(48, 64)}),
    "gpt_neox": ("query_key_value", {part: HEADS[:, i].ravel() for i, part in enumerate("qkv")}),
    "falcon": ("query_key_value", {"q": GROUPS[:, :2].ravel(), "k": GROUPS[:, 2].ravel(), "v": GROUPS[:, 3].ravel()}),
}
everywhere = pytest.mark.parametrize("family", ROWS)


def applied(family: str, parts: str = "q,v", method: str = "lora", **options: Any) -> Graph:
    step = make(method, **{"rank": 3, "alpha": 6, "targets": ROWS[family][0], "parts": parts, **options})
    return run.apply(graph_of(family), step)


@everywhere
@pytest.mark.parametrize("parts", ["q,v", "k", "q,k,v"])
def test_every_part_has_its_own_pair(family: str, parts: str) -> None:
    rows, graph = ROWS[family][1], randomised(applied(family, parts))
    item = fold.folds(graph)[0]
    a, b = (item.params[name]().double().numpy() for name in "ab")
    chosen, first = parts.split(","), 0
    expected = np.zeros((item.site.out, item.site.inp))
    for i, part in enumerate(chosen):
        count = len(rows[part])
        expected[rows[part]] = 2 * b[first : first + count] @ a[i]
        first += count
    assert (a.shape, b.shape) == ((len(chosen), 3, item.site.inp), (first, 3))
    found = item.normal(NOTHING).delta()
    assert found is not None
    assert np.abs(found.numpy() - expected).max() <= 1e-6 * np.abs(expected).max()


@everywhere
def test_the_laws_hold(family: str) -> None:
    base, graph = graph_of(family), applied(family)
    assert torch.equal(outputs_of(graph), outputs_of(base))
    trained = randomised(graph)
    model = load(trained).train()
    model(*inputs_of(graph))[0].square().sum().backward()
    for name in graph.trainable():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.flatten(0, -2).any(-1).all(), name
    merged = fold.fold(trained)
    assert merged.text() == base.text()
    assert close(outputs_of(merged), outputs_of(trained))
    planned = plan(base, *graph.applied)
    assert planned.trainable_parameters == sum(spec.count for spec in graph.trainable().values())


def test_a_lower_rank_of_dylora_is_a_lora_of_that_rank_for_every_part() -> None:
    from surgeon.ranks import at_rank

    graph = randomised(applied("phi3", method="dylora"))
    lower = at_rank(graph, 2)
    item, lora = fold.folds(lower)[0], randomised(applied("phi3", rank=2))
    a, b = fold.folds(graph)[0].tensors()["a"][:, :2], fold.folds(graph)[0].tensors()["b"][:, :2]
    lora.inserted[item.site.tensor("lora", "a")], lora.inserted[item.site.tensor("lora", "b")] = lambda: a, lambda: b
    expected = fold.folds(lora)[0].normal(NOTHING).delta()
    found = item.normal(NOTHING).delta()
    assert found is not None
    assert expected is not None
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert close(outputs_of(fold.fold(lower)), outputs_of(lower))


@pytest.mark.parametrize(("family", "rslora"), [("gpt2", False), ("gpt_neox", True)])
def test_peft_reads_it_as_one_lora(family: str, rslora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", captured)
    folder, base = base_of(family)
    step = make("lora", rank=3, alpha=6, rslora=rslora, targets=ROWS[family][0], parts="q,v")
    graph = randomised(run.apply(base, step))
    store.save(graph, tmp_path / "work")
    config = json.loads((tmp_path / "work" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (6, {}, {})
    model = PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    with torch.no_grad():
        logits = model(**dict(zip(graph.inputs, inputs_of(graph), strict=True))).logits.flatten()
    assert close(outputs_of(graph), logits)
    for name, theirs, ours in merged_pairs(model, graph):
        if rslora:  # alpha · √2 / √6 is rounded
            assert torch.allclose(theirs, ours, rtol=1e-6, atol=1e-6), name
        else:
            assert torch.equal(theirs, ours), name
    assert torch.equal(outputs_of(store.load(tmp_path / "work")), outputs_of(graph))
    plain = store.load_adapter(tmp_path / "work", folder)
    assert close(outputs_of(plain), outputs_of(graph))


def test_projections_of_one_part_have_plain_bypasses() -> None:
    graph = run.apply(graph_of("llama"), make("lora", rank=3, targets="*.{q,k,v}_proj", parts="q,v"))
    assert {item.site.path.rpartition(".")[2] for item in fold.folds(graph)} == {"q_proj", "v_proj"}
    assert graph.tensors["model.layers.0.self_attn.q_proj.lora.a"].shape == (3, 32)


@pytest.mark.parametrize(
    ("options", "what", "where"),
    [
        ({"parts": "q,x"}, "lora: 'x' is no part of a projection", "--parts"),
        ({"targets": "c_proj"}, "lora has no site to work on", "no attention node reads it"),
        ({"targets": "wte"}, "lora has no site to work on", "it is no linear"),
        ({"rank": 33}, "rank 33 is above the size of the layer", "c_attn is"),
    ],
)
def test_bad_input(options: dict[str, Any], what: str, where: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        applied("gpt2", **options)
    assert where in caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize("method", ["adalora", "dora"])
def test_methods_without_parts(method: str) -> None:
    with pytest.raises(UsageError, match=f"{method} has one bypass for a whole projection") as caught:
        make(method, parts="q,v")
    assert caught.value.where == "--parts"
