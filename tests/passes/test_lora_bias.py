"""PEFT's `lora_bias`: beside B A a bias that trains, read, written, merged to PEFT's bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import close, graph_of, inputs_of, outputs_of, randomised
from benchmarks.zoo.oracles import assert_merged_alike
from surgeon import convert, fold, run, store
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.model import load_model
from surgeon.module import load
from surgeon.passes import make
from surgeon.planning import plan

quiet = pytest.mark.filterwarnings("ignore")  # PEFT's own
TARGETS = {"gpt2": "c_attn c_proj", "bert": "query value"}


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", captured)


def step(family: str, **options: Any) -> Any:
    return make("lora", **{"rank": 3, "alpha": 4.0, "lora_bias": True, "targets": TARGETS[family], **options})


def logits(graph: Graph, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    with torch.no_grad():
        return load_model(graph)(**inputs).logits, model(**inputs).logits  # type: ignore[arg-type]


def test_it_begins_as_the_base_trains_and_merges() -> None:
    base, graph = graph_of("gpt2"), run.apply(graph_of("gpt2"), step("gpt2"))
    assert torch.equal(outputs_of(graph), outputs_of(base))
    trained = randomised(graph)
    model = load(trained).train()
    model(*inputs_of(graph))[0].square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(graph.trainable())
    assert {name.rpartition(".")[2] for name in moved} == {"a", "b", "c"}
    merged = fold.fold(trained)
    assert merged.text() == base.text()
    assert close(outputs_of(merged), outputs_of(trained))
    name = "transformer.h.0.attn.c_attn"
    added = merged.values[f"{name}.bias"] - base.values[f"{name}.bias"]
    assert torch.allclose(added, 4 / 3 * trained.inserted[f"{name}.lora.c"](), atol=1e-7)
    planned = plan(base, *graph.applied)
    assert planned.trainable_parameters == sum(spec.count for spec in graph.trainable().values())


@quiet
@pytest.mark.parametrize("family", TARGETS)
def test_peft_loads_and_merges_what_surgeon_writes(family: str, tmp_path: Path) -> None:
    folder, base = base_of(family)
    graph = randomised(run.apply(base, step(family, rslora=family == "bert")))
    store.save(graph, tmp_path / "work")
    assert json.loads((tmp_path / "work" / "adapter_config.json").read_text())["lora_bias"] is True
    again = store.load_adapter(tmp_path / "work")
    assert all(torch.equal(again.inserted[name](), graph.inserted[name]()) for name in graph.inserted)
    model = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    assert close(*logits(graph, model))
    assert_merged_alike(model, graph)


def theirs(family: str, folder: Path, **fields: Any) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=4, lora_bias=True, **fields)
    model = peft.get_peft_model(reference(base_of(family)[0]), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@quiet
def test_surgeon_loads_what_peft_writes(tmp_path: Path) -> None:
    model = theirs("gpt2", tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    graph = store.load_adapter(tmp_path, base_of("gpt2")[0])
    assert close(*logits(graph, model))
    assert_merged_alike(model, graph)


@quiet
def test_over_layers_without_a_bias_it_is_read_and_not_merged(tmp_path: Path) -> None:
    """As in PEFT, which says so when it merges; surgeon adapts no such layer by itself."""
    model = theirs("llama", tmp_path, target_modules=["q_proj"])
    graph = store.load_adapter(tmp_path, base_of("llama")[0])
    assert close(*logits(graph, model))
    with pytest.raises(UnsupportedError, match="needs a bias"):
        fold.fold(graph).values["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(UsageError, match="no site to work on") as caught:
        run.apply(graph_of("llama"), make("lora", lora_bias=True, targets="q_proj"))
    assert "no bias" in caught.value.where


def test_where_there_is_none() -> None:
    for method in ("dora", "dylora", "adalora"):
        with pytest.raises(UsageError, match="no bias of its own"):
            make(method, lora_bias=True)
    with pytest.raises(UsageError, match="no site to work on") as caught:
        run.apply(graph_of("gpt2"), make("lora", lora_bias=True, targets="wte"))
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(UnsupportedError, match="changes a bias"):
        convert.to_lora(randomised(run.apply(graph_of("gpt2"), step("gpt2"))))
