"""Virtual tokens in an encoder-decoder from the command line: applied, trained, measured, merged, written with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from surgeon.cli.main import main

Run = Callable[..., dict[str, Any]]

WORDS = ("<pad>", "</s>", "<unk>", *"abcdefgh")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(WORDS), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": " ".join(f"{a}{b}{a}"), "completion": f"{a} a"} for a in "bcdefg" for b in "abcd"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "d.jsonl"


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ("prefix", 3 * 2 * 2 * 4 * 8),
        pytest.param("prompt", 4 * 16, marks=pytest.mark.slow),
    ],  # three kinds of attention, K and V, two layers
)
def test_from_a_base_to_what_it_writes(
    method: str, numbers: int, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    work, merged = tmp_path / "work", tmp_path / "merged"
    planned = run("apply", base, "--method", method, "--tokens", 4, "-o", work)
    assert planned["trainable_parameters"] == planned["stored_parameters"] == numbers
    options = ("--steps", 20, "--lr", 0.3, "--batch-size", 8)
    trained = run("train", work, "--data", data, "--eval-data", data, *options)
    assert trained["loss"] < 0.9 * trained["first_loss"]
    measured = run("eval", work, "--data", data)
    assert measured["loss"] == trained["eval_loss"] < measured["base"]["loss"]
    assert run("merge", work, "-o", merged)["not_folded"] == [method]
    told = [run("generate", folder, "--prompt", "b a b", "--tokens", 5)["texts"] for folder in (work, merged)]
    assert told[0] == told[1]
    assert main(["generate", str(merged), "--prompt", "b a b", "--tokens", "5"]) == 0
    assert capsys.readouterr().out == f"{told[0][0]}\n"  # it writes a text of its own, and does not go on with ours
    assert main(["merge", str(work), "-o", str(tmp_path / "strict"), "--strict"]) == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 3
    assert not (tmp_path / "strict").exists()
