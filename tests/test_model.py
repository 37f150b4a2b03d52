"""A graph behaves as the Hugging Face model it was captured from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.zoo.graphs import graph_of, inputs_of, model_of, randomised
from surgeon import run
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.model import SurgeonModel, load_model, shifted_right
from surgeon.passes import make

TASKS = [
    ("llama", "causal-lm"),
    ("gemma2", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("t5", "seq2seq-lm"),
    ("bart", "seq2seq-lm"),
    ("bert", "sequence-classification"),
    ("bert", "token-classification"),
    ("bert", "question-answering"),
]


def batch_of(graph: Graph, padding: int = 2) -> dict[str, torch.Tensor]:
    batch = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    batch = {name: value for name, value in batch.items() if not name.startswith("decoder_") and name != "position_ids"}
    batch["attention_mask"][0, -padding:] = 0
    return batch


def labels_of(graph: Graph) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    if graph.task == "question-answering":
        return {"start_positions": torch.tensor([1, 3]), "end_positions": torch.tensor([2, 5])}
    if graph.task == "sequence-classification":
        return {"labels": torch.tensor([2, 0])}
    high = graph.config.num_labels if graph.task == "token-classification" else 100
    labels = torch.randint(0 if high < 9 else 3, high, (2, 7), generator=g)
    labels[0, -2:] = -100
    return {"labels": labels}


def pair(family: str, task: str | None = None) -> tuple[SurgeonModel, Any, Graph]:
    graph = graph_of(family, task)
    return load_model(graph), model_of(family, task), graph


def near(found: torch.Tensor | None, expected: torch.Tensor, relative: float = 2e-5) -> bool:
    assert found is not None
    return bool((found - expected).abs().max() <= relative * expected.abs().max())


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_losses_are_transformers_own(family: str, task: str) -> None:
    model, theirs, graph = pair(family, task)
    batch = batch_of(graph) | labels_of(graph)
    found, expected = model(**batch), theirs(**batch)
    assert near(found.loss, expected.loss)
    names = ("start_logits", "end_logits") if task == "question-answering" else ("logits",)
    for name in names:
        assert near(getattr(found, name), getattr(expected, name))
    given = {name: value for name, value in batch.items() if "label" not in name and "positions" not in name}
    if task == "seq2seq-lm":
        given["decoder_input_ids"] = shifted_right(batch["labels"], graph.config)
    plain = model(**given)
    assert plain.loss is None
    assert near(getattr(plain, names[0]), getattr(expected, names[0]))


@pytest.mark.parametrize(("family", "tokens"), [("llama", 10), ("bart", 12)])
def test_a_batch_in_parts_has_the_loss_of_the_whole(family: str, tokens: int) -> None:
    model, theirs, graph = pair(family)
    batch = batch_of(graph) | labels_of(graph)
    found = model(**batch, num_items_in_batch=torch.tensor(20)).loss
    assert near(found, theirs(**batch).loss * tokens / 20)


def test_features_have_names_and_no_loss() -> None:
    model, theirs, graph = pair("bert", "features")
    batch = batch_of(graph)
    found, expected = model(**batch), theirs(**batch)
    assert near(found.last_hidden_state, expected.last_hidden_state)
    assert near(found.pooler_output, expected.pooler_output)
    with pytest.raises(UsageError, match="the task features has no loss"):
        model(**batch, labels=torch.zeros(2, dtype=torch.long))
    with pytest.raises(UnsupportedError, match="does not generate"):
        model.generate(batch["input_ids"])


def test_outputs_are_model_outputs() -> None:
    model, _, graph = pair("llama")
    batch = batch_of(graph)
    output = model(**batch)
    assert list(output.keys()) == ["logits"]
    assert output[0] is output.logits
    with_loss = model(**batch, **labels_of(graph))
    assert list(with_loss.keys()) == ["loss"]
    assert near(with_loss.logits, output.logits)


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "qwen3"])
def test_names_are_those_of_transformers(family: str) -> None:
    model, theirs, _ = pair(family)
    ours, expected = model.state_dict(), theirs.state_dict()
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    theirs.load_state_dict(ours)
    model.load_state_dict(expected)


def test_what_is_tied_is_one_parameter() -> None:
    model, _, _ = pair("qwen3")
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradients_are_the_same_with_checkpointing(family: str) -> None:
    graph = randomised(run.apply(graph_of(family), make("lora", rank=3, targets="all-linear", dropout=0.2)))
    batch = batch_of(graph) | labels_of(graph)
    gradients = []
    for checkpointing in (False, True):
        model = load_model(graph).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing is checkpointing
        torch.manual_seed(0)
        loss = model(**batch).loss
        assert loss is not None
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])  # type: ignore[arg-type]
    assert any(name.endswith("lora.b") for name in gradients[0])


def test_gradients_are_those_of_transformers() -> None:
    model, theirs, graph = pair("llama")
    batch = batch_of(graph) | labels_of(graph)
    for one in (model, theirs):
        one.zero_grad()
        for parameter in one.parameters():
            parameter.requires_grad_(True)
        one(**batch).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert near(parameter.grad, expected[name].grad, 1e-4), name
    theirs.zero_grad()
    for parameter in theirs.parameters():
        parameter.requires_grad_(False)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_it_runs_in_the_dtype_it_is_moved_to(family: str) -> None:
    model, _, graph = pair(family)
    batch = batch_of(graph)
    exact = model(**batch).logits
    moved = model.to(torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    coarse = moved(**batch).logits
    assert coarse is not None
    assert coarse.dtype == torch.bfloat16
    assert near(coarse.float(), exact, 0.1)
    assert near(model.to(torch.float32)(**batch).logits, exact, 0.1)
    assert model.device == torch.device("cpu")


def test_dropout_is_for_training_alone() -> None:
    model, _, graph = pair("bert")
    batch = batch_of(graph)
    assert not model.training
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_inputs_that_may_be_left_out() -> None:
    model, theirs, graph = pair("llama")
    ids = batch_of(graph)["input_ids"]
    assert near(model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    positions = torch.arange(7)[None]
    assert near(model(input_ids=ids, position_ids=positions).logits, theirs(input_ids=ids).logits)
    assert near(
        model(input_ids=ids, use_cache=False, return_dict=True, output_attentions=None).logits, theirs(ids).logits
    )


def test_an_unknown_input_names_the_nearest() -> None:
    model, _, graph = pair("llama")
    with pytest.raises(UsageError, match="no input 'attention_maks'") as caught:
        model(input_ids=batch_of(graph)["input_ids"], attention_maks=torch.ones(2, 7))
    assert "attention_mask" in caught.value.hint
    with pytest.raises(UsageError, match="'input_ids' is missing"):
        model(attention_mask=torch.ones(2, 7))


def test_labels_are_shifted_as_transformers_does() -> None:
    theirs = model_of("t5")
    labels = torch.tensor([[5, 6, -100], [7, 8, 9]])
    assert torch.equal(shifted_right(labels, theirs.config), theirs._shift_right(labels))


def test_trained_values_go_back_into_the_graph() -> None:
    base = run.apply(graph_of("llama"), make("lora", rank=3))
    model = load_model(base)
    name = "model.layers.0.self_attn.q_proj.lora.b"
    with torch.no_grad():
        model.get_parameter(name).fill_(0.5)
    graph = model.trained()
    assert graph.inserted[name]().unique().tolist() == [0.5]
    assert not base.inserted[name]().any()
    assert not graph.inserted[name]().requires_grad
    batch = batch_of(graph)
    assert torch.equal(load_model(graph)(**batch).logits, model(**batch).logits)
