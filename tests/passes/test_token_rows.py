from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import close, graph_of, inputs_of, model_of, outputs_of, randomised
from benchmarks.zoo.oracles import assert_merged_alike, losses_on
from surgeon import convert, fold, passes, run, store
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph, tag
from surgeon.lower.merge import merge
from surgeon.model import load_model
from surgeon.module import load
from surgeon.normal import Base, Normal, Replaced, compose
from surgeon.planning import plan
from surgeon.source import open_source

quiet = pytest.mark.filterwarnings("ignore")  # PEFT's own
TOKENS = "5,17,3"
ROWS = [5, 17, 3]


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", captured)


def applied(family: str = "llama", **options: Any) -> Graph:
    return run.apply(graph_of(family), passes.make("token_rows", **{"tokens": TOKENS, **options}))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "t5", "bart"])
def test_the_graph_computes_it(family: str) -> None:
    """Against transformers with the rows written into its table, which a tied head shares."""
    graph, model = randomised(applied(family), std=0.5), copy.deepcopy(model_of(family))
    with torch.no_grad():
        model.get_input_embeddings().weight[ROWS] = graph.inserted["token_rows.rows"]()  # type: ignore[index,operator]
        named = dict(zip(graph.inputs, inputs_of(graph), strict=True))
        named = {
            name: torch.full_like(value, 5) if name.endswith("input_ids") else value for name, value in named.items()
        }
        expected = model(**named).logits
        found = load(graph)(*named.values())[0]
    assert close(found, expected)
    assert not close(load(graph_of(family))(*named.values())[0], expected)


def test_it_begins_as_the_base() -> None:
    assert torch.equal(outputs_of(applied("llama")), outputs_of(graph_of("llama")))
    for family in ("gemma2", "bart"):  # few columns of a tied head are multiplied in another order than all
        assert close(outputs_of(applied(family)), outputs_of(graph_of(family)))
    graph = applied("llama")
    assert torch.equal(graph.inserted["token_rows.rows"](), graph.values["model.embed_tokens.weight"][ROWS])
    drawn = applied("llama", init="normal").inserted["token_rows.rows"]()
    assert drawn.shape == (3, 32)
    assert 0.7 < drawn.std() < 1.3


def test_only_the_rows_train_and_only_where_they_are_read() -> None:
    graph = randomised(applied("llama"))
    model = load(graph).train()
    inputs = inputs_of(graph)
    inputs[0] = torch.where(inputs[0] == 17, 4, inputs[0])
    inputs[0][0, 2] = 5
    model(*inputs)[0].square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(found) == ["token_rows.rows"]
    assert found["token_rows.rows"][0].any()
    assert not found["token_rows.rows"][1].any()


def test_a_tied_head_trains_them_too() -> None:
    graph = randomised(applied("gemma2"))
    model, inputs = load(graph).train(), inputs_of(applied("gemma2"))
    inputs[0] = inputs[0].masked_fill(inputs[0] == 17, 4)
    model(*inputs)[0].square().sum().backward()
    grad = model.get_parameter("token_rows.rows").grad
    assert grad is not None
    assert grad[1].any()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_nothing_of_the_tables_size_is_made(family: str) -> None:
    graph = applied(family)
    table = graph.values["model.embed_tokens.weight"].shape
    inserted = [node for node in graph.trunk.nodes if tag(node) is not None]
    assert inserted
    assert all(tuple(node.meta["val"].shape) != tuple(table) for node in inserted)
    step = plan(graph_of(family), passes.make("token_rows", tokens=TOKENS))
    assert step.trainable_parameters == 3 * table[1]
    assert step.flops_per_token.adapter == (6 * table[1] if family == "gemma2" else 0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bart"])
def test_merging_writes_the_rows_and_nothing_else(family: str, tmp_path: Path) -> None:
    folder, base = base_of(family)
    graph = randomised(run.apply(base, passes.make("token_rows", tokens=TOKENS)))
    merged = fold.fold(graph)
    assert merged.ties == base.ties
    name = next(site.weight for site in run.chosen_sites(base, graph.applied[0])[0])
    table = base.values[name].clone()
    table[ROWS] = graph.inserted["token_rows.rows"]()
    for other in base.tensors:
        assert torch.equal(merged.values[other], table if other == name else base.values[other]), other
    made = merge(graph, open_source(folder, graph.task), tmp_path / "merged")
    assert made.comparison is not None
    again = reference(tmp_path / "merged")
    assert torch.equal(again.get_input_embeddings().weight, table)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == bool(base.ties)


def test_beside_a_lora_on_the_embedding_the_rows_are_what_is_read() -> None:
    for order in (0, 1):
        steps = [passes.make("lora", rank=2, targets="embed_tokens q_proj"), passes.make("token_rows", tokens=TOKENS)]
        graph = randomised(run.apply(graph_of("gemma2"), *(steps if order == 0 else steps[::-1])))
        merged = fold.fold(graph)
        rows = merged.values["model.embed_tokens.weight"][ROWS]
        assert torch.equal(rows, graph.inserted["token_rows.rows"]()) == (order == 0)
        assert torch.equal(merged.values["lm_head.weight"][ROWS], graph.inserted["token_rows.rows"]())
        assert close(outputs_of(merged), outputs_of(graph))


@quiet
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("beside", ["", "lora", "dora"])
def test_peft_reads_what_surgeon_writes(family: str, beside: str, tmp_path: Path) -> None:
    folder, base = base_of(family)
    steps = [passes.make("token_rows", tokens=TOKENS)]
    if beside:
        steps = [passes.make(beside, rank=2, targets=["q_proj", "c_attn"][family == "gpt2"]), *steps]
    graph = randomised(run.apply(base, *steps))
    store.save(graph, tmp_path / "work")
    assert [p.name for p in (tmp_path / "work").iterdir() if p.is_dir()] == []
    for again in (store.load(tmp_path / "work"), store.load_adapter(tmp_path / "work")):
        assert again.text() == graph.text()
        assert all(torch.equal(again.inserted[name](), graph.inserted[name]()) for name in graph.trainable())
    model = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    inputs = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    inputs["input_ids"][:, :3] = torch.tensor(ROWS)
    with torch.no_grad():
        assert close(load_model(graph)(**inputs).logits, model(**inputs).logits)  # type: ignore[arg-type]
    assert_merged_alike(model, graph)


@quiet
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.TrainableTokensConfig(token_indices=ROWS),
        lambda: peft.TrainableTokensConfig(token_indices=ROWS, target_modules=["embed_tokens"]),
        lambda: peft.LoraConfig(target_modules=["v_proj"], trainable_token_indices=ROWS),
        lambda: peft.LoraConfig(target_modules=["v_proj"], trainable_token_indices={"embed_tokens": ROWS}),
    ],
    ids=["alone", "named", "list", "dict"],
)
def test_surgeon_reads_what_peft_writes(family: str, config: Any, tmp_path: Path) -> None:
    folder, _ = base_of(family)
    model = peft.get_peft_model(reference(folder), config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "theirs")
    graph = store.load_adapter(tmp_path / "theirs", folder)
    assert "token_rows.rows" in graph.trainable()
    assert_merged_alike(model.eval(), graph)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"tokens": ""}, "no token is named"),
        ({"tokens": " , "}, "no token is named"),
        ({"tokens": "5,112"}, "no row 112"),
        ({"tokens": "-1"}, "no row -1"),
        ({"tokens": "5,7,5"}, "named twice"),
        ({"tokens": "<|im_start|>"}, "no tokenizer"),
        ({"targets": "q_projx"}, "no module matches"),
        ({"exclude": "embed_tokens"}, "no site to work on"),
        ({"init": "zeros"}, "init is"),
    ],
)
def test_what_cannot_be_is_said_in_three_lines(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        applied("llama", **options)
    assert len(str(caught.value).splitlines()) == 3


def test_the_targets_of_a_method_beside_it_are_not_its_own() -> None:
    assert applied("llama", targets="*.{q,v}_proj").applied == applied("llama").applied
    assert applied("llama", targets="all-linear").applied == applied("llama").applied


def test_one_table_at_a_time() -> None:
    with pytest.raises(UsageError, match="2 embeddings are meant"):
        applied("gpt2", targets="wte wpe")
    both = run.apply(applied("gpt2"), passes.make("token_rows", tokens="1,2", targets="wpe"))
    assert set(both.trainable()) == {"token_rows.rows", "token_rows_2.rows"}
    both = randomised(both)
    assert close(outputs_of(fold.fold(both)), outputs_of(both))


def test_tokens_are_named_by_their_text(shared: Path) -> None:
    base = shared / "models"
    folder = next(path.parent for path in sorted(base.glob("*/tokenizer.json")))
    graph = captured(open_source(folder))
    words = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    word = words[0]["content"]
    step = passes.make("token_rows", tokens=word).fitted(graph)
    assert step.options()["tokens"] == str(words[0]["id"])
    with pytest.raises(UsageError, match="is not one token") as caught:
        passes.make("token_rows", tokens="no such word at all").fitted(graph)
    assert "its tokens" in caught.value.hint or "nearest" in caught.value.hint


def test_it_converts_to_a_lora_of_as_many_ranks() -> None:
    graph = randomised(applied("llama"))
    made = convert.to_lora(graph, rank=3)
    assert max(site.error for site in made.sites) < 1e-6
    assert close(outputs_of(made.graph), outputs_of(graph))


def test_replaced_rows_in_parts() -> None:
    weight = torch.arange(24.0).view(6, 4)
    rows = Normal(replaced=Replaced(-2, torch.tensor([4, 1]), torch.full((2, 4), -1.0)))
    whole = rows.merged(weight)
    assert whole[[4, 1]].eq(-1).all()
    assert torch.equal(torch.cat([rows.outputs(slice(i, i + 3)).merged(weight[i : i + 3]) for i in (0, 3)]), whole)
    parts = [rows.inputs(slice(i, i + 2)).merged(weight[:, i : i + 2]) for i in (0, 2)]
    assert torch.equal(torch.cat(parts, 1), whole)
    with pytest.raises(UnsupportedError, match="rows of the weight are replaced"):
        compose(rows, Normal())
    assert Base(lambda: weight).bias() is None
    assert weight[1, 0] == 4


def test_it_learns_a_new_word() -> None:
    model = load_model(applied("gemma2")).train()
    ids = torch.tensor([[5, 40, 5, 41, 5, 40]])
    losses = losses_on(model, ids, lr=0.05, steps=30)
    assert losses[-1] < 0.7 * losses[0]
