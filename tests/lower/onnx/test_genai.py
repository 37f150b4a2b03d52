"""The genai package, loaded and run by ONNX Runtime GenAI itself: the tokens are torch's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime_genai
import pytest

from benchmarks.zoo import graphs
from surgeon import api, lower, run
from surgeon.errors import UnsupportedError
from surgeon.graph import Graph
from surgeon.lower.onnx import export, genai
from surgeon.passes import make
from tests.lower.onnx.conftest import traces
from tests.lower.onnx.runtimes import by_genai

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]


def generated(folder: Path, prompt: list[int], expected: list[int]) -> list[int]:
    """As many tokens as are expected, the end of the text being a token that is not: GenAI would not choose its own.

    A search of a `min_length` takes the end out of the choice until then, and a random model chooses it as any other.
    """
    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"eos_token_id": min(set(range(3, 112)) - set(expected))}}))
    return by_genai(onnxruntime_genai.Model(config), prompt, len(expected))


def replayed(report: export.OnnxReport) -> tuple[list[int], list[int]]:
    """The prompt and the tokens that agreed with torch, of the first batch."""
    assert report.replay is not None
    assert report.token_agreement == 1.0
    batch = report.replay.batches[0]
    return batch.prompts[0], batch.tokens[0]


def exported(graph: Graph, folder: Path) -> export.OnnxReport:
    return export.export_onnx(graph, folder, profile="genai")


@pytest.fixture(scope="module")
def llama(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> export.OnnxReport:
    """The real model, with its tokenizer."""
    model = shared / "models" / "pystdlib-llama"
    found = lower.export(model, tmp_path_factory.mktemp("genai") / "onnx", target="onnx", profile="genai")
    assert isinstance(found, export.OnnxReport)
    return found


def test_it_generates_the_tokens_of_torch(llama: export.OnnxReport) -> None:
    prompt, expected = replayed(llama)
    assert llama.attention == "gqa"
    assert generated(llama.folder, prompt, expected) == expected


def test_weights_are_bound_and_no_file_tells_where_it_was_made(llama: export.OnnxReport) -> None:
    assert llama.weights.form == "bind"
    assert traces(llama.folder) == []


def test_the_config_shares_the_cache_and_tells_nothing_else(llama: export.OnnxReport) -> None:
    config = json.loads((llama.folder / "genai_config.json").read_text())
    assert config["model"]["type"] == "decoder"
    assert config["search"]["past_present_share_buffer"] is True
    assert (config["model"]["bos_token_id"], config["model"]["eos_token_id"]) == (1, 2)
    assert set(config) == {"model", "search"}


def test_its_tokenizer_is_that_of_the_model(llama: export.OnnxReport, shared: Path) -> None:
    theirs: Any = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(llama.folder)))
    ours: Any = api.tokenizer_of(shared / "models" / "pystdlib-llama")
    text = "import os\n\ndef main(path):\n    return os.path.join(path, 'x')\n"
    ids = [int(token) for token in theirs.encode(text)]
    assert ids in (ours(text)["input_ids"], ours(text, add_special_tokens=False)["input_ids"])
    assert theirs.decode(theirs.encode(text)).strip() == text.strip()


def test_its_tokenizer_has_the_chat_template(llama: export.OnnxReport, shared: Path, tmp_path: Path) -> None:
    tokenizer: Any = api.tokenizer_of(shared / "models" / "pystdlib-llama")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    shutil.copytree(llama.folder, tmp_path / "onnx")
    genai.write_tokenizer(tokenizer, tmp_path / "onnx")
    theirs: Any = onnxruntime_genai.Tokenizer(onnxruntime_genai.Model(str(tmp_path / "onnx")))
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert theirs.apply_chat_template(json.dumps(MESSAGES), add_generation_prompt=False) == expected


@pytest.mark.slow
def test_standard_operators_do_not_share_the_cache(tmp_path: Path) -> None:
    graph = graphs.randomised(run.apply(graphs.graph_of("llama"), make("prefix", tokens=2)), std=0.5)
    report = exported(graph, tmp_path / "onnx")
    config = json.loads((report.folder / "genai_config.json").read_text())
    assert report.attention == "standard"
    assert config["search"]["past_present_share_buffer"] is False
    prompt, expected = replayed(report)
    assert generated(report.folder, prompt, expected) == expected


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt_oss", "mixtral", "mistral", "gemma2", "gemma3_text", "gpt2", "opt"])
def test_families(family: str, tmp_path: Path) -> None:
    report = exported(graphs.graph_of(family), tmp_path / "onnx")
    prompt, expected = replayed(report)
    assert generated(report.folder, prompt, expected) == expected


def test_what_does_not_generate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="GenAI generates text"):
        exported(graphs.graph_of("bert", "features"), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
