"""P-Tuning v2: counts, the head, dropout, every task, saving, and the same function as PEFT's prefix with a head."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import surgeon
from benchmarks.zoo.encoder import save_encoder
from benchmarks.zoo.graphs import graph_of, inputs_of, randomised
from surgeon import fold, planning, run
from surgeon.capture import capture_config
from surgeon.errors import UnsupportedError, UsageError
from surgeon.module import load
from surgeon.passes import make
from surgeon.passes.base import Adapter

TASKS = ("sequence-classification", "token-classification", "question-answering", "multiple-choice")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def adapted(base: Path, task: str, **options: Any) -> Any:
    """The model with random values for all that trains."""
    labels = {"labels": ("a", "b", "c")} if "classification" in task else {}
    model = surgeon.apply(base, "ptuning-v2", task=task, tokens=5, **labels, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    return model


def inputs(task: str) -> dict[str, torch.Tensor]:
    shape = (2, 3, 7) if task == "multiple-choice" else (2, 7)
    ids = torch.randint(5, 40, shape, generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, ..., 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def result(model: Any, task: str) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs(task))
    return torch.cat([output.start_logits, output.end_logits]) if task == "question-answering" else output.logits


@pytest.mark.parametrize("task", [TASKS[0], TASKS[3]])
def test_prefix_and_head_train_and_come_back(encoder: Path, tmp_path: Path, task: str) -> None:
    model = adapted(encoder, task)
    step = model.graph.applied[0]
    assert step.modules_to_save == "classifier"
    assert step.dropout == 0.1
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "ptuning_v2" not in name} == {
        f"{step.modules_to_save}.{leaf}" for leaf in ("weight", "bias")
    }
    model.save(tmp_path / "work")
    loaded = surgeon.load(tmp_path / "work")
    assert torch.equal(result(loaded, task), result(model, task))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trained
    loaded.train()
    assert not torch.equal(result(loaded, task), result(model, task)), "dropout on the columns"


def test_counts_of_roberta_large() -> None:
    config = transformers.RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, num_labels=2,
    )  # fmt: skip
    graph = capture_config(config, "token-classification")
    found = planning.plan(graph, make("ptuning_v2", tokens=8))
    assert found.trainable_parameters == 393_216 + 1024 * 2 + 2
    assert found.stored_parameters == found.trainable_parameters
    assert found.site_count == 24


def peft_twin(encoder: Path, model: Any, task: str) -> Any:
    """PEFT's prefix tuning on transformers' model, with our values."""
    kind = {"sequence-classification": "SEQ_CLS", "token-classification": "TOKEN_CLS"}.get(task, "QUESTION_ANS")
    auto = getattr(transformers, _auto(task))
    options = {"num_labels": 3} if "classification" in task else {}
    twin = peft.get_peft_model(
        auto.from_pretrained(encoder, attn_implementation="eager", **options),
        peft.PrefixTuningConfig(task_type=kind, num_virtual_tokens=5),
    )
    graph = model.trained()
    sites = [name for name in graph.inserted if name.endswith("ptuning_v2.k")]
    columns = [graph.inserted[name.removesuffix("k") + part]() for name in sites for part in "kv"]
    with torch.no_grad():
        twin.prompt_encoder["default"].embedding.weight.copy_(torch.stack(columns).permute(2, 0, 1, 3).flatten(1))
        for name, parameter in twin.base_model.named_parameters():
            if ".modules_to_save.default." in name:
                parameter.copy_(model.get_parameter(name.replace(".modules_to_save.default", "")))
    return twin.eval()


def _auto(task: str) -> str:
    return "AutoModelFor" + "".join(word.capitalize() for word in task.split("-"))


@pytest.mark.parametrize("task", [*TASKS[:1], *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:3])])
def test_equals_peft_in_both_directions(encoder: Path, tmp_path: Path, task: str) -> None:
    model = adapted(encoder, task)
    twin = peft_twin(encoder, model, task)
    torch.testing.assert_close(result(model, task), result(twin, task), rtol=0, atol=1e-5)
    twin.save_pretrained(tmp_path / "theirs")
    ours = surgeon.load(tmp_path / "theirs", base=encoder)
    torch.testing.assert_close(result(ours, task), result(twin, task), rtol=0, atol=1e-5)
    model.save(tmp_path / "work")
    saved = load_file(tmp_path / "work/adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in theirs.items()}
    assert json.loads((tmp_path / "work/adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    options = {"num_labels": 3} if "classification" in task else {}
    base = getattr(transformers, _auto(task)).from_pretrained(encoder, attn_implementation="eager", **options)
    back = peft.PeftModel.from_pretrained(base, tmp_path / "work").eval()
    torch.testing.assert_close(result(back, task), result(model, task), rtol=0, atol=1e-5)


def test_an_mlp_and_other_options() -> None:
    graph = run.apply(graph_of("bert"), make("ptuning_v2", tokens=3, hidden=6, dropout=0.0))
    assert graph.applied[0].dropout == 0.0  # type: ignore[attr-defined]
    assert any(name.endswith("encoder_table") for name in graph.trainable())
    assert isinstance(graph.applied[0], Adapter)
    assert graph.applied[0].modules_to_save == "classifier"
    with pytest.raises(UsageError, match="tokens is 0"):
        make("ptuning_v2", tokens=0)
    with pytest.raises(UsageError, match="dropout is 1"):
        make("ptuning_v2", dropout=1.0)


def test_a_language_model_trains_columns_alone() -> None:
    graph = run.apply(graph_of("llama"), make("ptuning_v2", tokens=3))
    assert {name.rpartition(".")[2] for name in graph.trainable()} == {"k", "v"}
    base = run.apply(graph_of("llama"), make("prefix", tokens=3))
    assert graph.text().replace("ptuning_v2", "prefix") == base.text()


def test_refusals_name_what_works() -> None:
    features = dataclasses.replace(graph_of("bert"), task="features")
    with pytest.raises(UsageError, match="has none") as caught:
        run.apply(features, make("ptuning_v2"))
    assert "--task" in caught.value.hint
    plain = graph_of("bert").copy()
    plain.layers = {path: _without_attention(part) for path, part in plain.layers.items()}
    with pytest.raises(UnsupportedError, match="needs an attention node") as refused:
        run.apply(plain, make("ptuning_v2"))
    assert "lora" in refused.value.hint


def _without_attention(part: Any) -> Any:
    from surgeon.graph import copied

    fresh = copied(part)[0]
    for node in fresh.nodes:
        if node.target is torch.ops.surgeon.attention.default:
            node.target = torch.ops.aten.scaled_dot_product_attention.default
    return fresh


def outputs(graph: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([value.flatten() for value in load(graph)(*inputs_of(graph))])


@pytest.mark.parametrize("other", ["lora", "vera"])
@pytest.mark.parametrize("first", [True, False])
def test_pairs_with_low_rank_methods_fold_and_come_apart(other: str, first: bool) -> None:
    base = graph_of("bert")
    low, deep = make(other, targets="all-linear", rank=3), make("ptuning_v2", tokens=3)
    both = randomised(run.apply(base, *((deep, low) if first else (low, deep))))
    merged = fold.fold(both)
    assert [step.name for step in merged.applied] == ["ptuning_v2"]
    torch.testing.assert_close(outputs(merged), outputs(both), rtol=1e-4, atol=1e-5)
    assert merged.text() == run.apply(base, deep).text()
    assert fold.without(merged, {"ptuning_v2"}).text() == base.text()
    assert fold.without(both, {"ptuning_v2"}).text() == run.apply(base, low).text()


def test_planned_counts_are_the_measured_ones() -> None:
    graph = run.apply(graph_of("bert"), make("ptuning_v2", tokens=3))
    found = planning.plan(graph_of("bert"), make("ptuning_v2", tokens=3))
    model = load(graph)
    assert found.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trainable_parameters == 2 * 2 * 3 * 32 + 3 * 33


def test_gradient_checkpointing_changes_no_gradient(encoder: Path) -> None:
    model = adapted(encoder, "sequence-classification", dropout=0.0)
    given = {**inputs("sequence-classification"), "labels": torch.tensor([0, 2])}
    found = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        torch.manual_seed(0)
        model.train()(**given).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == set(model.graph.trainable())
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])
