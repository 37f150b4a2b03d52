"""LoRA at the experts of a mixture: the function, PEFT's `target_parameters` both ways, and its merge bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import close, inputs_of, outputs_of, randomised
from benchmarks.zoo.oracles import assert_merged_alike
from surgeon import fold, passes, run, store
from surgeon.errors import UsageError
from surgeon.graph import Graph
from surgeon.lower.merge import merge
from surgeon.lower.onnx import export as onnx
from surgeon.normal import Base
from surgeon.planning import plan
from surgeon.sites import EXPERTS, sites
from surgeon.source import open_source

# Mixtral keeps experts as [experts, out, in], gpt-oss as [experts, in, out] with biases, Llama 4 multiplies all by all.
FAMILIES = ["mixtral", "gpt_oss", "llama4_text", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
# PEFT looks for its patterns among modules alone before it says so, and applies them to parameters too.
pytestmark = pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
everywhere = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", captured)


def trained(family: str, targets: str = "*.experts.*,q_proj", **options: Any) -> Graph:
    options = {"rank": 3, "alpha": 6, "ranks": {"down_proj": 2}, **options}
    return randomised(run.apply(base_of(family)[1], passes.make("lora", targets=targets, **options)))


@torch.no_grad()
def logits(model: Any, graph: Graph) -> torch.Tensor:
    result: torch.Tensor = model(**dict(zip(graph.inputs, inputs_of(graph), strict=True))).logits
    return result.flatten()


@everywhere
def test_it_is_w_plus_ba_for_every_expert(family: str) -> None:
    graph = trained(family)
    model = reference(base_of(family)[0])
    for item in fold.folds(graph):
        p, weight = item.tensors(), model.get_parameter(item.site.weight).data
        weight += item.site.stored(item.step.scale * p["b"] @ p["a"])  # type: ignore[attr-defined]
    assert close(outputs_of(graph), logits(model, graph))


@everywhere
def test_peft_reads_what_is_written(family: str, tmp_path: Path) -> None:
    graph = trained(family)
    store.save(graph, tmp_path / "work")
    config = json.loads((tmp_path / "work" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    assert config["target_modules"] == ["q_proj"]
    model = PeftModel.from_pretrained(reference(base_of(family)[0]), tmp_path / "work").eval()
    assert close(outputs_of(graph), logits(model, graph))
    assert_merged_alike(model, graph)
    again = store.load(tmp_path / "work")
    assert torch.equal(outputs_of(again), outputs_of(graph))


@everywhere
@pytest.mark.parametrize("parameters", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]])
def test_what_peft_writes_is_read(family: str, parameters: list[str], tmp_path: Path) -> None:
    folder, base = base_of(family)
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["v_proj"], target_parameters=parameters, rank_pattern={"down_proj": 2},
        use_rslora=True,
    )  # fmt: skip
    model = get_peft_model(reference(folder), config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path)
    graph = store.load_adapter(tmp_path, folder)
    assert {site.path.rpartition(".")[2] for site in sites(graph, EXPERTS)} == {"gate_up_proj", "down_proj"}
    assert close(outputs_of(graph), logits(model, graph))
    assert (outputs_of(graph) - outputs_of(base)).abs().max() > 1e-2
    assert_merged_alike(model, graph)


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_merged_checkpoint(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtral's checkpoints have a matrix per expert and projection; they come out as they were."""
    monkeypatch.setattr("surgeon.lower.merge.open_graph", captured)
    graph, folder = trained(family, "*.experts.*"), base_of(family)[0]
    made = merge(graph, open_source(folder), tmp_path / "merged")
    assert made.comparison is not None
    assert close(logits(reference(tmp_path / "merged"), graph), outputs_of(graph))
    names = [set(load_file(next(place.glob("*.safetensors")))) for place in (folder, tmp_path / "merged")]
    assert names[0] == names[1]


def test_onnx_has_them_folded_in(tmp_path: Path) -> None:
    graph = trained("mixtral", "*.experts.*")
    assert onnx.export_onnx(graph, tmp_path / "onnx").token_agreement == 1.0


def test_the_router_may_be_a_parameter_too(tmp_path: Path) -> None:
    folder, _ = base_of("mixtral")
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"], init_lora_weights=False)
    model = get_peft_model(reference(folder), config)
    model.save_pretrained(tmp_path)
    graph = store.load_adapter(tmp_path, folder)
    assert [item.site.path for item in fold.folds(graph)] == [f"model.layers.{i}.mlp.gate" for i in range(4)]
    assert close(outputs_of(graph), logits(model, graph))
    assert_merged_alike(model, graph)


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_all_linear_leaves_experts_alone_and_says_so(method: str) -> None:
    base, step = base_of("mixtral")[1], passes.make(method, rank=2, targets="all-linear")
    assert not {item.site.kind for item in fold.folds(run.apply(base, step))} & {EXPERTS}
    skipped = plan(base, step).skipped
    assert {skip.path for skip in skipped} == {site.path for site in sites(base, EXPERTS)}
    assert {"all-experts" in skip.why for skip in skipped} == {method == "lora"}


def test_all_experts_are_named() -> None:
    base = base_of("mixtral")[1]
    graph = run.apply(base, passes.make("lora", rank=2, targets="all-linear all-experts"))
    kinds = {item.site.kind for item in fold.folds(graph)}
    assert kinds == {"linear", EXPERTS}
    assert not plan(base, *graph.applied).skipped
    with pytest.raises(UsageError, match="no site to work on"):
        run.apply(base_of("llama")[1], passes.make("lora", targets="all-experts"))


def test_a_rank_above_the_experts() -> None:
    with pytest.raises(UsageError, match="rank 33 is above the size of the layer") as caught:
        trained("mixtral", "*.experts.gate_up_proj", rank=33)
    assert "at most 32" in caught.value.hint


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow), "llama4_text"])
def test_some_experts(family: str, tmp_path: Path) -> None:
    """The others compute what they did, in the graph, merged, and in PEFT."""
    folder, base = base_of(family)
    last = next(site for site in sites(base, EXPERTS)).experts - 1
    graph = trained(family, "*.experts.*", experts=f"0,{last}")
    planned = plan(base, *graph.applied)
    assert planned.trainable_parameters == sum(spec.count for spec in graph.trainable().values())
    for item in fold.folds(graph):
        assert item.params["a"]().shape[0] == 2
        delta = item.normal(Base(lambda: torch.empty(0))).delta()
        assert delta is not None
        assert [bool(part.any()) for part in delta] == [e in (0, last) for e in range(last + 1)]
    merged = fold.fold(graph)
    assert merged.text() == base.text()
    assert close(outputs_of(merged), outputs_of(graph))
    assert not close(outputs_of(base), outputs_of(graph))
    store.save(graph, tmp_path / "work")
    assert torch.equal(outputs_of(store.load(tmp_path / "work")), outputs_of(graph))
    model = PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    assert close(outputs_of(graph), logits(model, graph))
    assert_merged_alike(model, graph)


@pytest.mark.parametrize(
    ("options", "what", "where"),
    [
        ({"experts": "0,9"}, "there is no expert 9", "has 4 experts"),
        ({"experts": "0;2"}, "'0;2' is no number", "--experts"),
        ({"experts": "3-1"}, "'3-1' is no number", "--experts"),
        ({"experts": "1", "targets": "q_proj"}, "no target is a layer's experts", "--experts"),
    ],
)
def test_experts_that_there_are_not(options: dict[str, Any], what: str, where: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        run.apply(base_of("mixtral")[1], passes.make("lora", **{"rank": 2, "targets": "*.experts.*", **options}))
    assert where in caught.value.where
    assert len(str(caught.value).splitlines()) == 3


def test_dora_has_no_form_at_experts() -> None:
    """As in PEFT, which raises where it is asked for one."""
    with pytest.raises(UsageError, match="no site to work on") as caught:
        run.apply(base_of("mixtral")[1], passes.make("dora", rank=2, targets="*.experts.*"))
    assert "dora has no form at what is of kind experts" in caught.value.where
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"], use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True"):
        get_peft_model(reference(base_of("mixtral")[0]), config)


def test_cut_experts_are_named(tmp_path: Path) -> None:
    folder, _ = base_of("mixtral")
    place = store.save(trained("mixtral"), tmp_path / "work")
    file = place / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    tensors[key] = tensors[key][:, :9].contiguous()
    save_file(tensors, file)
    with pytest.raises(UsageError, match="in the adapter, and its place in the base") as caught:
        store.load_adapter(place, folder)
    assert key in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3
