"""Generation gives transformers' own tokens: greedy, beams, sampling; padded, past windows; without loading twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache, TextStreamer

from benchmarks.zoo import build, graphs
from benchmarks.zoo.causal import causal_config
from surgeon import api, module, run
from surgeon.chat import Chat, chat_turns, complete
from surgeon.errors import UsageError
from surgeon.generate import generator
from surgeon.model import load_model
from surgeon.passes import make

NEW = 10  # 7 + 10 tokens: past the window of 5
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 2},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
}


def both(family: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that transformers generates for a left-padded batch, and ours."""
    model = graphs.model_of(family)
    tokens = build.tokens(model.config, 2, 7, padding=3)
    made = []
    for one in (model, generator(module.load(graphs.graph_of(family)))):
        torch.manual_seed(3)
        made.append(one.generate(**tokens, max_new_tokens=NEW, min_new_tokens=NEW, **options))
    return made[0], made[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", "t5"])
def test_tokens_equal_transformers(family: str, mode: str) -> None:
    theirs, ours = both(family, **MODES[mode])
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("family", ["gpt_oss", "opt", "gemma3n_text", "llama4_text", "bart"])
def test_greedy_tokens_equal_transformers(family: str) -> None:
    theirs, ours = both(family, do_sample=False)
    assert torch.equal(theirs, ours)


def test_a_model_without_a_cache_generates_the_same_tokens() -> None:
    model = build.build(causal_config("git"))  # its mask depends on the ids
    ours = generator(module.load(graphs.graph_over(model, model.config, "causal-lm")))
    assert not ours.has_cache
    tokens = build.tokens(model.config, 2, 7, padding=3)
    made = [x.generate(**tokens, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False) for x in (model, ours)]
    assert torch.equal(*made)


def test_tensors_are_shared_with_the_loaded_module() -> None:
    loaded = module.load(graphs.graph_of("llama"))
    runner = generator(loaded).runners[0]
    own = dict(loaded.named_parameters())
    assert {name: id(p) for name, p in runner.named_parameters()} == {name: id(p) for name, p in own.items()}


def test_a_trained_weight_is_generated_with() -> None:
    loaded = module.load(graphs.graph_of("llama"))
    tokens = build.tokens(loaded.graph.config, 1, 4)
    before = generator(loaded).generate(**tokens, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        loaded.get_parameter("model.norm.weight").neg_()
    after = generator(loaded).generate(**tokens, max_new_tokens=8, do_sample=False)
    assert not torch.equal(before, after)


def test_a_cache_may_be_continued() -> None:
    model = generator(module.load(graphs.graph_of("mistral")))
    tokens = build.tokens(model.config, 1, 6)
    whole = model.generate(**tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    cache = model.new_cache()
    first = model.generate(**tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache)
    second = model.generate(first, max_new_tokens=4, min_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(whole, second)


def test_caches_of_other_kinds_are_refused() -> None:
    model = generator(module.load(graphs.graph_of("mistral")))
    tokens = build.tokens(model.config, 1, 6)
    with pytest.raises(UsageError, match="cache_implementation 'static'"):
        model.generate(**tokens, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(UsageError, match="drops tokens or has a fixed size"):
        model.generate(**tokens, max_new_tokens=2, past_key_values=StaticCache(model.config, max_cache_len=16))


def test_encoders_do_not_generate() -> None:
    with pytest.raises(UsageError, match="does not generate"):
        generator(module.load(graphs.graph_of("bert")))


@pytest.fixture(scope="module")
def python_model() -> tuple[Any, Any, Any]:
    """The shared Llama: ours, its tokenizer, and transformers' own."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "models" / "pystdlib-llama"
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return api.load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder), theirs


def test_prompts_are_completed_as_transformers_does(python_model: tuple[Any, Any, Any]) -> None:
    ours, tokenizer, theirs = python_model
    prompts = ["def main(", "import os\nimport sys\n\nclass"]
    texts = complete(ours, tokenizer, prompts, max_new_tokens=16, do_sample=False)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


def test_stop_strings_and_streamers(python_model: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    ours, tokenizer, _ = python_model
    options = {"max_new_tokens": 40, "do_sample": False, "streamer": TextStreamer(tokenizer, skip_prompt=True)}
    text = complete(ours, tokenizer, ["def main("], stop_strings=[")"], **options)[0]
    assert text.index(")") == len(text) - 1
    assert capsys.readouterr().out.strip() == text.strip()


def test_chat_needs_a_template(python_model: tuple[Any, Any, Any]) -> None:
    ours, tokenizer, _ = python_model
    with pytest.raises(UsageError, match="no chat template") as error:
        Chat(ours, tokenizer)
    assert str(error.value).count("\n") == 2


def test_a_conversation_streams_remembers_and_resets(python_model: tuple[Any, Any, Any]) -> None:
    ours, tokenizer, _ = python_model
    template = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    told = AutoTokenizer.from_pretrained(tokenizer.name_or_path, chat_template=template)
    chat, pieces = Chat(ours, told, system="terse", max_new_tokens=6, do_sample=False), []
    lines = iter(["def f(x):", "", "return", "/reset", "import os", "/exit", "never read"])
    answers = chat_turns(chat, lambda: next(lines), pieces.append)
    assert answers == 3
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[1]["content"] == "import os"
    assert "".join(pieces).rstrip().endswith(chat.messages[2]["content"].rstrip())


@pytest.mark.parametrize(
    ("family", "steps", "tokens", "what"),
    [
        ("gpt2", [], 60, "position 64 is beyond the 64 that the model has"),
        ("gpt2", [("prefix", {})], 55, "position 59 is beyond the 59 that 5 virtual tokens leave"),
        ("opt", [("prompt", {"init": "normal"})], 55, "position 59 is beyond the 59 that 5 virtual tokens leave"),
        ("bart", [("prompt", {"init": "normal"})], 60, "position 59 is beyond the 59 that 5 virtual tokens leave"),
        ("bart", [], 65, "position 64 is beyond the 64 that the model has"),
    ],
)
def test_a_text_that_outgrows_the_table_of_positions_is_refused(
    family: str, steps: list[tuple[str, dict[str, Any]]], tokens: int, what: str
) -> None:
    graph = graphs.graph_of(family)
    made = [make(name, tokens=5, **options) for name, options in steps]
    model = load_model(run.apply(graph, *made) if made else graph)
    with pytest.raises(UsageError, match=what) as caught:
        model.generate(torch.full((1, tokens), 5), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert caught.value.where
    assert "a shorter text" in caught.value.hint
