"""Heads that no checkpoint has: found, drawn from the seed, trained with the adapter, saved, loaded, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from benchmarks.zoo.encoder import save_encoder
from benchmarks.zoo.graphs import graph_of
from surgeon import api, planning, store
from surgeon.errors import UsageError
from surgeon.heads import head_modules, relabelled
from surgeon.passes import make
from surgeon.source import open_graph, open_source

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TARGETS = "*.{query,value}"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder without a head."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier whose classes have names."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    config = BertConfig(**SIZES, max_position_embeddings=32, id2label={0: "bad", 1: "good"})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


def adapted(base: Path, **options: Any) -> Any:
    return api.apply(base, "lora", task="sequence-classification", targets=TARGETS, rank=2, **options)


@pytest.mark.parametrize(
    ("family", "task", "found"),
    [
        ("bert", "sequence-classification", ("classifier",)),
        ("distilbert", "sequence-classification", ("pre_classifier", "classifier")),
        ("llama", "sequence-classification", ("score",)),
        ("t5", "sequence-classification", ("classification_head",)),
        ("llama", "causal-lm", ()),
    ],
)
def test_heads_by_architecture(family: str, task: str, found: tuple[str, ...]) -> None:
    assert head_modules(graph_of(family, task)) == found


def test_a_new_head_follows_labels_and_seed(encoder: Path) -> None:
    once, again, other = (adapted(encoder, labels="abc", seed=seed) for seed in (3, 3, 4))
    head = once.get_parameter("classifier.weight")
    assert once.graph.fresh == ("classifier",)
    assert tuple(head.shape) == (3, 16)
    assert head.requires_grad
    assert torch.equal(head, again.get_parameter("classifier.weight"))
    assert not torch.equal(head, other.get_parameter("classifier.weight"))
    assert head.std().item() == pytest.approx(0.02, rel=0.5)
    assert once.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_trained_head_stays_frozen_until_asked(classifier: Path) -> None:
    model = adapted(classifier)
    assert model.graph.fresh == ()
    assert not model.get_parameter("classifier.weight").requires_grad
    renamed = adapted(classifier, labels=("x", "y", "z"))
    assert tuple(renamed.get_parameter("classifier.weight").shape) == (3, 16)
    assert renamed.get_parameter("classifier.weight").requires_grad


def test_the_head_is_saved_loaded_and_merged(encoder: Path, tmp_path: Path) -> None:
    model = adapted(encoder, labels=("neg", "pos"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    ids = torch.randint(5, 30, (2, 6))
    expected = model(input_ids=ids).logits
    model.save(tmp_path / "work")
    loaded = api.load(tmp_path / "work")
    assert loaded.config.id2label == {0: "neg", 1: "pos"}
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    api.merge(tmp_path / "work", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "neg", 1: "pos"}
    assert merged.config.architectures == ["BertForSequenceClassification"]
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_plan_from_the_config_counts_the_new_head(encoder: Path) -> None:
    source = open_source(encoder, "sequence-classification", labels=("a", "b", "c"), weights=False)
    graph = open_graph(source, values=False)
    found = planning.plan(graph, make("lora", rank=2, targets=TARGETS))
    assert found.trainable_parameters == 4 * 2 * 32 + 3 * 17


def test_relabelled_keeps_what_was_learned(encoder: Path) -> None:
    model = adapted(encoder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    graph = relabelled(model.trained(), ("a", "b", "c"), seed=0)
    name = next(name for name in graph.trainable() if name.endswith("lora.b"))
    assert torch.equal(graph.inserted[name](), model.get_parameter(name))
    assert graph.inserted["classifier.weight"]().shape == (3, 16)
    same = relabelled(model.trained(), ("a", "b"), seed=0)
    assert torch.equal(same.inserted["classifier.weight"](), model.get_parameter("classifier.weight"))


def test_a_second_adapter_leaves_the_head_to_the_first(encoder: Path, tmp_path: Path) -> None:
    both = api.apply(adapted(encoder, labels=("a", "b")), "vera", rank=2, targets=TARGETS)
    assert [step.modules_to_save for step in both.graph.applied] == ["classifier", ""]
    store.save(both.trained(), tmp_path / "work")
    assert api.load(tmp_path / "work").graph.trainable().keys() == both.graph.trainable().keys()


def test_classes_of_a_task_without_any(encoder: Path) -> None:
    with pytest.raises(UsageError, match="has no classes"):
        open_source(encoder, "question-answering", labels=("a", "b"))
