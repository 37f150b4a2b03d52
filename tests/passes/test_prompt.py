"""Prompt tuning: the formula, first values, both sides, refusals, what stands beside it, and what it costs."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import T5Config

from benchmarks.zoo.folders import base_of
from benchmarks.zoo.graphs import graph_of, inputs_of, model_of, randomised
from surgeon import fold, run, store, text
from surgeon.capture import capture_config
from surgeon.cli.main import main
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.graph import Graph, copied, sweep, tag
from surgeon.model import load_model
from surgeon.module import load
from surgeon.passes import make, parse

TOKENS = 4


@functools.cache
def prompted(family: str = "llama", **options: Any) -> Graph:
    return run.apply(graph_of(family), make("prompt", **{"tokens": TOKENS, **options}))


def rows_of(graph: Graph, side: str = "") -> torch.Tensor:
    (name,) = [name for name in graph.trainable() if name.endswith("prompt.rows") and side in name]
    return graph.inserted[name]()


class Letters:
    """A tokenizer of letters that begins every text with id 1."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) - 90 for letter in text]}


def embedding(family: str, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model_of(family).get_input_embeddings()(torch.tensor(ids))
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "bart"])
def test_it_is_the_formula_in_numpy(family: str) -> None:
    graph = randomised(prompted(family))
    inputs, trunk = inputs_of(graph), copied(graph.trunk)[0]
    (whole,) = [node for node in trunk.nodes if (mark := tag(node)) and mark.outer]
    next(iter(reversed(trunk.nodes))).args = ((whole,),)
    sweep(trunk)
    found = load(graph).run(trunk, *inputs)[0].detach().numpy()
    scale, table = {"llama": 1, "gemma2": 32**0.5, "bart": 32**0.5}[family], embedding(family, range(112)).numpy()
    given = model_of(family).get_input_embeddings().weight.detach().numpy() * scale
    p, ids = rows_of(graph).numpy(), inputs[0].numpy()
    expected = np.stack([np.concatenate([p, given[one]]) for one in ids])
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert np.allclose(given, table)


def test_the_graph_shows_it(repo: Path) -> None:
    golden = (repo / "tests" / "golden" / "llama_prompt.diff").read_text(encoding="utf-8")
    assert text.diff(graph_of("llama"), prompted(), context=0) + "\n" == golden


@pytest.mark.parametrize("layout", ["tokens", "peft"])
@torch.no_grad()
def test_both_sides_of_an_encoder_decoder(layout: str) -> None:
    graph = randomised(prompted("t5", side="both", layout=layout))
    inputs = dict(zip(graph.inputs, inputs_of(graph), strict=True))
    parts = {}
    for name, side in (("input_ids", "encoder"), ("decoder_input_ids", "decoder")):
        tokens = embedding("t5", inputs[name].tolist())
        parts[name.replace("input_ids", "inputs_embeds")] = torch.cat(
            [rows_of(graph, side).expand(2, -1, -1), tokens], 1
        )
    expected = model_of("t5")(**parts).logits
    found = load_model(graph)(**inputs).logits
    first = TOKENS if layout == "tokens" else 0
    assert found.shape == expected[:, first:].shape
    assert (found - expected[:, first:]).abs().max() <= 1e-5


@pytest.mark.parametrize("side", ["decoder", "both"])
def test_a_prompted_decoder_generates_with_a_cache(side: str) -> None:
    model = load_model(randomised(prompted("t5", side=side)))
    ids = torch.randint(3, 112, (2, 6))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_first_values(family: str) -> None:
    def first(init: str, tokenizer: Any = None) -> torch.Tensor:
        step = make("prompt", tokens=6, init=init)
        return rows_of(run.apply(graph_of(family), step, tokenizer=tokenizer))

    uniform, normal, sampled = first("uniform"), first("normal"), first("vocabulary")
    assert uniform.abs().max() <= 0.5
    assert uniform.abs().max() >= 0.35
    assert 0.8 <= normal.std() <= 1.2
    table = embedding(family, range(112))
    chosen = torch.cdist(sampled, table).argmin(1)
    assert torch.allclose(sampled, table[chosen], atol=1e-6)
    assert len(set(chosen.tolist())) == 6
    assert torch.equal(sampled, first("vocabulary"))
    assert torch.allclose(first("text:abc", Letters()), embedding(family, [1, 7, 8, 9, 1, 7]))
    assert torch.allclose(first("text:abcdefghi", Letters()), embedding(family, [1, 7, 8, 9, 10, 11]))
    labels = first("labels:ab|c", Letters())
    assert torch.allclose(labels[0], embedding(family, [7, 8]).mean(0))
    assert torch.allclose(labels[1], embedding(family, [9])[0])
    assert torch.allclose(labels[2:], table[torch.cdist(labels[2:], table).argmin(1)], atol=1e-6)


REFUSED = [
    ("llama", {"tokens": 0}, "tokens is 0"),
    ("llama", {"tokens": 64}, "leave no room"),
    ("gpt2", {"tokens": 70}, "leave no room"),
    ("llama", {"side": "both"}, "no encoder-decoder and has no side 'both'"),
    ("llama", {"init": "zeros"}, "init is 'zeros'"),
    ("llama", {"side": "left"}, "side is 'left'"),
    ("llama", {"layout": "both"}, "layout is 'both'"),
    ("llama", {"init": "text:"}, "no tokens"),
    ("llama", {"init": "labels:a|b|c", "tokens": 2}, "do not fit into 2"),
    pytest.param("gemma3n_text", {}, "reads ids elsewhere", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "options", "what"), REFUSED)
def test_what_cannot_be_is_refused(family: str, options: dict[str, Any], what: str) -> None:
    class Silent(Letters):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [7] * len(text)}

    with pytest.raises(SurgeonError) as caught:
        rows_of(run.apply(graph_of(family), make("prompt", **options), tokenizer=Silent()))
    assert what in caught.value.what
    assert caught.value.where
    assert caught.value.hint


def test_a_text_needs_a_tokenizer() -> None:
    graph = run.apply(graph_of("llama"), make("prompt", init="text:a helper"))
    with pytest.raises(UsageError, match="'a helper', and the model has no tokenizer") as caught:
        load(graph)
    assert "--init vocabulary" in caught.value.hint
    assert parse(graph.applied[0].spec()) == graph.applied[0]


def test_a_work_folder_opens_without_the_tokenizer(tmp_path: Path) -> None:
    graph = run.apply(base_of("llama")[1], make("prompt", tokens=TOKENS, init="text:abc"), tokenizer=Letters())
    store.save(graph, tmp_path / "work")
    assert torch.equal(rows_of(store.load(tmp_path / "work")), rows_of(graph))


def test_positions_of_ones_own_are_refused() -> None:
    model, ids = load_model(prompted()), torch.arange(3, 9)[None]
    counted = torch.arange(6)[None]
    assert torch.equal(model(input_ids=ids, position_ids=counted).logits, model(input_ids=ids).logits)
    with pytest.raises(UsageError, match="do not count on from the virtual tokens") as caught:
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert "packed" in caught.value.hint


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_a_text_has_the_positions_that_the_prompt_leaves(family: str) -> None:
    model = load_model(prompted(family))
    more = {"decoder_input_ids": torch.ones(1, 5, dtype=torch.long)} if family == "bart" else {}
    assert model(input_ids=torch.ones(1, 60, dtype=torch.long), **more).logits is not None
    with pytest.raises(UsageError, match="position 60 is beyond the 60 that 4 virtual tokens leave"):
        model(input_ids=torch.ones(1, 61, dtype=torch.long), **more)


def test_it_is_applied_once() -> None:
    with pytest.raises(UsageError, match="already applied"):
        run.apply(prompted(), make("prompt"))


def test_there_has_to_be_an_embedding_of_tokens() -> None:
    graph = graph_of("llama").copy()
    graph.trunk = copied(graph.trunk)[0]
    (node,) = [node for node in graph.trunk.nodes if node.name == "embedding"]
    node.target = torch.ops.aten.index_select.default
    with pytest.raises(UnsupportedError, match="no token embedding") as caught:
        run.apply(graph, make("prompt"))
    assert "lora" in caught.value.hint


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_learns_and_nothing_else_changes(checkpointing: bool) -> None:
    model = load_model(prompted()).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    ids = torch.randint(3, 112, (4, 8))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.1), []
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == set(model.graph.trainable())


@pytest.mark.parametrize("others", [("lora",), ("vera",), ("prefix",)])
@pytest.mark.parametrize("last", [False, True])
@torch.no_grad()
def test_it_stands_beside_others(others: tuple[str, ...], last: bool) -> None:
    base, prompt = graph_of("gemma2"), make("prompt", tokens=TOKENS)
    rest = [
        make(name, **({"tokens": 2} if name == "prefix" else {"rank": 3, "targets": "*.q_proj"})) for name in others
    ]
    names, steps = ("rest", [*rest, prompt]) if last else ("prompt", [prompt, *rest])
    both = randomised(run.apply(base, *steps))
    found = load(both)(*inputs_of(both))[0]
    assert found.shape == (2, 7, 112)
    other = randomised(run.apply(base, *reversed(steps)))
    other.inserted = dict(both.inserted)
    assert torch.allclose(load(other)(*inputs_of(both))[0], found, atol=1e-5), names
    assert fold.without(both, {"prompt"}).text() == run.apply(base, *rest).text()
    assert fold.without(both, {*others}).text() == run.apply(base, prompt).text()
    model = load_model(both)
    ids, mask = torch.randint(3, 112, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_an_adapter_of_the_embedding_stays_below_it() -> None:
    base, lora = graph_of("gemma2"), make("lora", rank=3, targets="embed_tokens")
    prompt = make("prompt", tokens=TOKENS)
    for steps in ((lora, prompt), (prompt, lora)):
        both = randomised(run.apply(base, *steps))
        merged = fold.fold(both)
        assert merged.text() == run.apply(base, prompt).text()
        inputs = inputs_of(both)
        with torch.no_grad():
            assert torch.allclose(load(merged)(*inputs)[0], load(both)(*inputs)[0], atol=1e-5)


# Lester et al. 2021, table 4 (C-67 to C-70): p · d for T5 1.1, and its totals without them. Transformers 5 ties the
# head that T5 1.1 has of its own, V · d numbers less.
VOCABULARY = 32128
T5 = {
    "small": ((512, 6, 1024, 8), 76_961_152),
    "base": ((768, 12, 2048, 12), 247_577_856),
    "large": ((1024, 16, 2816, 24), 783_150_080),
    "xl": ((2048, 32, 5120, 24), 2_849_757_184),
    "xxl": ((4096, 64, 10240, 24), 11_135_332_352),
}


@pytest.mark.parametrize("size", ["small", *(pytest.param(size, marks=pytest.mark.slow) for size in list(T5)[1:])])
def test_it_trains_what_the_paper_counts(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (width, heads, inner, layers), total = T5[size]
    config = T5Config(
        vocab_size=VOCABULARY, d_model=width, num_heads=heads, d_ff=inner, num_layers=layers, d_kv=64,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    once = functools.cache(lambda: capture_config(config))
    monkeypatch.setattr("surgeon.source.capture_config", lambda *_: once())
    for tokens in (1, 5, 20, 50, 100, 150):
        assert main(["plan", str(tmp_path), "--method", f"prompt(tokens={tokens})", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["trainable_parameters"] == found["stored_parameters"] == tokens * width
        assert found["base_parameters"] + VOCABULARY * width == total
