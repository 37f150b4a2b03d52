"""LoRA at convolutions and at torch's own multi-head attention: the function, the merge, PEFT both ways."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING

from benchmarks.zoo import build
from benchmarks.zoo.custom import OddConfig, OddModel
from benchmarks.zoo.graphs import close, graph_over, inputs_of, outputs_of, randomised
from benchmarks.zoo.oracles import assert_merged_alike
from surgeon import fold, run, store
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.lower.merge import merge
from surgeon.module import load
from surgeon.passes import make
from surgeon.planning import plan
from surgeon.source import Source, open_graph, open_source

CONVOLUTIONS = "plain,grouped,dilated,plane"
PLACE = tempfile.TemporaryDirectory(prefix="surgeon-odd-")
ENCODER = {
    "vocab_size": 112, "hidden_size": 32, "embedding_size": 32, "num_attention_heads": 4, "intermediate_size": 48,
    "num_hidden_layers": 1, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


@functools.cache
def odd() -> tuple[Source, Graph]:
    """The model of `benchmarks.zoo.custom` on disk."""
    folder = build.save(build.build(OddConfig(), "base"), Path(PLACE.name) / "base")
    source = open_source(folder, "features")
    return source, open_graph(source)


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    for module in ("surgeon.peft_load", "surgeon.store", "surgeon.lower.merge"):
        monkeypatch.setattr(f"{module}.open_graph", lambda source, **_: _over(source))


def _over(source: Source) -> Graph:
    return odd()[1].copy() if source.folder == odd()[0].folder else open_graph(source)


def reference() -> Any:
    return OddModel.from_pretrained(odd()[0].folder).eval()


def applied(targets: str, method: str = "lora", **options: Any) -> Graph:
    return run.apply(odd()[1], make(method, **{"rank": 4, "alpha": 8, "targets": targets, **options}))


@torch.no_grad()
def states(model: Any, graph: Graph) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=inputs_of(graph)[0]).last_hidden_state
    return result.flatten()


def beside(module: nn.Module, p: dict[str, torch.Tensor]) -> Any:
    """A module with Δ added to its weight, group by group: every output of a group is a b of its own rows of a."""
    groups = getattr(module, "groups", 1)
    rows = [b @ a for a, b in zip(p["a"].chunk(groups), p["b"].chunk(groups), strict=True)]
    weight = module.get_parameter("in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight")
    weight.data += 2 * torch.cat(rows).reshape(weight.shape)


@pytest.mark.parametrize(
    ("targets", "method", "rank"),
    [(CONVOLUTIONS, "lora", 4), ("point", "lora", 2), ("attend,out_proj", "lora", 4), ("plain,plane", "dylora", 3),
     ("plain,dilated,plane,attend", "adalora", 3), ("plain,dilated,plane", "dora", 3)],
)  # fmt: skip
def test_the_laws_hold(targets: str, method: str, rank: int) -> None:
    base, graph = odd()[1], applied(targets, method, rank=rank, alpha=2 * rank)
    assert torch.equal(outputs_of(graph), outputs_of(base))
    trained = randomised(graph)
    model = load(trained).train()
    model(*inputs_of(graph))[0].square().sum().backward()
    trainable = graph.trainable()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == set(trainable)
    merged = fold.fold(trained)
    assert merged.text() == base.text()
    assert close(outputs_of(merged), outputs_of(trained))
    planned = plan(base, *graph.applied)
    assert planned.trainable_parameters == sum(spec.count for spec in trainable.values())
    if method == "lora":
        expected = reference()
        for item in fold.folds(trained):
            beside(expected.get_submodule(item.site.path), item.tensors())
        assert close(outputs_of(trained), states(expected, graph))


def test_first_values_see_the_whole_window() -> None:
    graph = applied("plane,grouped")
    plane, grouped = (graph.tensors[f"layers.0.{name}.lora.a"].shape for name in ("plane", "grouped"))
    assert (plane, grouped) == ((4, 15), (4, 24))
    assert graph.inserted["layers.0.plane.lora.a"]().abs().max() <= 15**-0.5
    assert not graph.inserted["layers.0.plane.lora.b"]().any()


def test_a_merged_checkpoint(tmp_path: Path) -> None:
    graph = randomised(applied(f"{CONVOLUTIONS},attend,out_proj"))
    made = merge(graph, odd()[0], tmp_path / "merged")
    assert made.comparison is not None
    assert close(states(OddModel.from_pretrained(tmp_path / "merged").eval(), graph), outputs_of(graph))


@pytest.mark.parametrize("targets", ["plain,plane,point", "grouped,dilated"])
def test_peft_reads_what_is_written(targets: str, tmp_path: Path) -> None:
    graph = randomised(applied(targets, ranks={"point": 2}))
    store.save(graph, tmp_path / "work")
    assert torch.equal(outputs_of(store.load(tmp_path / "work")), outputs_of(graph))
    if "grouped" in targets:
        with pytest.warns(UserWarning, match="groups > 1"):
            model = PeftModel.from_pretrained(reference(), tmp_path / "work").eval()
        module = model.base_model.model.layers[0].grouped  # PEFT has no merge in groups, and its A is not dilated
        x = torch.randn(2, 32, 7)
        with torch.no_grad():
            weight = fold.fold(graph).values["layers.0.grouped.weight"]
            own = nn.functional.conv1d(x, weight, module.base_layer.bias, padding="same", groups=4)
            assert close(module(x), own)
        return
    model = PeftModel.from_pretrained(reference(), tmp_path / "work").eval()
    assert close(outputs_of(graph), states(model, graph))
    assert_merged_alike(model, graph)


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dora": ("dora", {}, {"use_dora": True}),
    "lora_bias": ("lora", {"lora_bias": True}, {"lora_bias": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_reads_and_merges_variants(variant: str, tmp_path: Path) -> None:
    method, options, _ = VARIANTS[variant]
    graph = randomised(applied("plain,plane", method, **options))
    store.save(graph, tmp_path / "work")
    assert torch.equal(outputs_of(store.load(tmp_path / "work")), outputs_of(graph))
    model = PeftModel.from_pretrained(reference(), tmp_path / "work").eval()
    assert close(outputs_of(graph), states(model, graph))
    assert_merged_alike(model, graph)


@pytest.mark.filterwarnings("ignore")  # PEFT takes a bias for a matrix that was cut
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_that_peft_writes_are_read(variant: str, tmp_path: Path) -> None:
    method, _, fields = VARIANTS[variant]
    model = peft_model("plain", "plane", **fields)
    model.save_pretrained(tmp_path)
    graph = store.load_adapter(tmp_path, odd()[0].folder, "features")
    assert graph.applied[0].name == method
    assert close(outputs_of(graph), states(model, graph))
    assert_merged_alike(model, graph)


def test_dora_with_dropout_is_pefts_in_training(tmp_path: Path) -> None:
    graph = randomised(applied("plain", "dora", dropout=0.3))
    store.save(graph, tmp_path / "work")
    theirs, ids = PeftModel.from_pretrained(reference(), tmp_path / "work", is_trainable=True), inputs_of(graph)[0]
    torch.manual_seed(3)
    found = load(graph).train()(ids)[0]
    torch.manual_seed(3)
    assert close(found.detach(), theirs.train()(input_ids=ids).last_hidden_state.detach())


def test_dora_has_no_form_in_groups() -> None:
    with pytest.raises(UsageError, match="no site to work on") as caught:
        applied("grouped", "dora")
    assert "in groups" in caught.value.where


def peft_model(*targets: str, **fields: Any) -> Any:
    model = get_peft_model(reference(), LoraConfig(r=4, lora_alpha=12, target_modules=list(targets), **fields))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_what_peft_writes_is_read(tmp_path: Path) -> None:
    model = peft_model("plain", "plane")
    model.save_pretrained(tmp_path)
    graph = store.load_adapter(tmp_path, odd()[0].folder, "features")
    assert close(outputs_of(graph), states(model, graph))
    assert_merged_alike(model, graph)


def test_what_peft_has_above_the_size_of_a_layer_is_read(tmp_path: Path) -> None:
    model = peft_model("point")
    model.save_pretrained(tmp_path)
    graph = store.load_adapter(tmp_path, odd()[0].folder, "features")
    assert close(outputs_of(graph), states(model, graph))


def test_an_adapter_that_mixes_groups_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="groups > 1"):
        model = peft_model("grouped")
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="mixes the groups of a convolution") as caught:
        store.load_adapter(tmp_path, odd()[0].folder, "features")
    assert len(str(caught.value).splitlines()) == 3


def test_attention_of_torch_in_peft(tmp_path: Path) -> None:
    """PEFT 0.21 adds the change of the output projection twice (its issue 3774), in forward and merge; we, once."""
    graph = randomised(applied("attend,out_proj"))
    store.save(graph, tmp_path / "work")
    config = json.loads((tmp_path / "work" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attend"]
    assert torch.equal(outputs_of(store.load(tmp_path / "work")), outputs_of(graph))
    merged, base = fold.fold(graph), odd()[1]
    model = PeftModel.from_pretrained(reference(), tmp_path / "work").merge_and_unload()
    for name, parameter in model.named_parameters():
        if name.endswith("out_proj.weight"):
            twice = 2 * merged.values[name] - base.values[name]
            assert torch.allclose(parameter, twice, rtol=0, atol=1e-6), name
        else:
            assert torch.equal(parameter, merged.values[name]), name


def test_attention_of_torch_from_peft(tmp_path: Path) -> None:
    model = peft_model("attend")
    model.save_pretrained(tmp_path)
    graph = store.load_adapter(tmp_path, odd()[0].folder, "features")
    assert {item.site.path.split(".", 2)[2] for item in fold.folds(graph)} == {"attend", "attend.out_proj"}
    merged, theirs = fold.fold(graph), dict(model.merge_and_unload().named_parameters())
    for layer in range(2):
        name = f"layers.{layer}.attend.in_proj_weight"
        assert torch.equal(theirs[name], merged.values[name])


def test_one_projection_alone_is_kept_in_our_own_form(tmp_path: Path) -> None:
    graph = randomised(applied("attend"))
    store.save(graph, tmp_path / "work")
    assert not (tmp_path / "work" / "adapter_config.json").exists()
    assert torch.equal(outputs_of(store.load(tmp_path / "work")), outputs_of(graph))


@pytest.mark.parametrize(
    ("rank", "targets", "what", "where"),
    [
        (3, "grouped", "no site to work on", "rank 3 is no multiple of its 4 groups"),
        (7, "plane", "rank 7 is above the size of the layer", "plane"),
        (52, "grouped", "rank 52 is above the size of the layer", "grouped"),
    ],
)
def test_bad_ranks(rank: int, targets: str, what: str, where: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        applied(targets, rank=rank)
    assert where in caught.value.where
    assert caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "fields", "targets", "rank"),
    [
        ("squeezebert", {"q_groups": 2, "k_groups": 2, "v_groups": 2}, "query,key,conv1d", 4),
        ("convbert", {"conv_kernel_size": 3, "head_ratio": 2}, "depthwise,pointwise", 32),
    ],
)
def test_models_of_text_with_convolutions(model: str, fields: dict[str, Any], targets: str, rank: int) -> None:
    config = CONFIG_MAPPING[model](**ENCODER, **fields)
    base = graph_over(build.build(config, "base"), config, "features")
    step = make("lora", rank=rank, targets=targets, ranks={"pointwise": 4})
    trained = randomised(run.apply(base, step))
    merged = fold.fold(trained)
    assert merged.text() == base.text()
    assert close(outputs_of(merged), outputs_of(trained))
    assert not close(outputs_of(base), outputs_of(trained))


def test_adalora_over_planes_in_peft(tmp_path: Path) -> None:
    graph = randomised(applied("plane", "adalora"))
    store.save(graph, tmp_path / "work")
    model = PeftModel.from_pretrained(reference(), tmp_path / "work").eval()
    assert close(outputs_of(graph), states(model, graph))
    assert_merged_alike(model, graph)
    assert torch.equal(outputs_of(store.load(tmp_path / "work")), outputs_of(graph))


@pytest.mark.parametrize("targets", ["plain", "attend,out_proj"])
def test_adalora_where_peft_has_none_is_kept_in_our_own_form(targets: str, tmp_path: Path) -> None:
    graph = randomised(applied(targets, "adalora"))
    store.save(graph, tmp_path / "work")
    assert not (tmp_path / "work" / "adapter_config.json").exists()
    assert torch.equal(outputs_of(store.load(tmp_path / "work")), outputs_of(graph))
