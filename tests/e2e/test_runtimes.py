"""A trained adapter merged into four exports: the text that five runtimes make of one prompt is the same text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import openvino
import pytest

import surgeon
from surgeon import api
from surgeon.cli.main import main
from surgeon.lower.onnx.export import MODEL
from surgeon.lower.onnx.session import decode, open_session
from surgeon.render import Rendered, load_data
from surgeon.train import train
from tests.lower.onnx.runtimes import EXACT, by_genai, by_openvino, by_transformers_js

pytestmark = pytest.mark.slow
PROMPT = "#ifndef PARSER_H\n#define PARSER_H\n\nstatic inline int parse_header("
TOKENS = 40
PROFILES = ("ort", "genai", "web", "openvino")


@dataclass(frozen=True)
class Trained:
    """A work folder, its exports, and what torch generates with the adapter and without it."""

    base: Path
    work: Path
    exports: dict[str, Path]

    def tokenizer(self, profile: str) -> Any:
        """That of an export."""
        found = api.tokenizer_of(self.exports[profile])
        assert found is not None
        return found

    def prompt(self, profile: str) -> list[int]:
        """The prompt in tokens."""
        ids: list[int] = self.tokenizer(profile)(PROMPT)["input_ids"]
        return ids

    def text(self, profile: str, tokens: list[int]) -> str:
        """Tokens in words."""
        found: str = self.tokenizer(profile).decode(tokens, skip_special_tokens=True)
        return found


@pytest.fixture(scope="module")
def trained(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """LoRA on all linears, 40 steps on C headers; the base has read Python only."""
    base, root = shared / "models/pystdlib-llama", tmp_path_factory.mktemp("runtimes")
    model = surgeon.apply(base, "lora", rank=8, targets="all-linear")
    every = load_data(shared / "data/c_headers.train.jsonl", model.tokenizer, 64).samples
    data = Rendered(every[:: len(every) // 160][:160])
    report = train(
        model, model.tokenizer, data, out=root / "run", steps=40, batch_size=4, warmup=0, lr=3e-3, progress=False
    )
    assert report.loss < report.first_loss - 0.5
    work = model.eval().save(root / "work")
    for profile in PROFILES:
        found = surgeon.export(work, root / profile, profile=profile)
        assert found.token_agreement == 1.0
    return Trained(base, work, {profile: root / profile for profile in PROFILES})


def by_torch(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `surgeon generate` continues the prompt with."""
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", PROMPT, "--tokens", str(TOKENS), "--json"]) == 0
    text: str = json.loads(capsys.readouterr().out)["texts"][0]
    return text


def by_onnxruntime(made: Trained) -> str:
    ids = np.array([made.prompt("ort")])
    whole, _, _ = decode(open_session(made.exports["ort"] / MODEL), ids, np.ones_like(ids), TOKENS)
    return made.text("ort", whole[0, ids.shape[1] :].tolist())


def by_genai_alone(made: Trained) -> str:
    """With its own tokenizer."""
    model = onnxruntime_genai.Model(str(made.exports["genai"]))
    tokenizer: Any = onnxruntime_genai.Tokenizer(model)
    prompt = [int(token) for token in tokenizer.encode(PROMPT)]
    text: str = tokenizer.decode(np.array(by_genai(model, prompt, TOKENS), np.int32))
    return text


def by_openvino_alone(made: Trained) -> str:
    model = openvino.Core().compile_model(str(made.exports["openvino"] / MODEL), "CPU", EXACT)
    tokens, _ = by_openvino(model, [made.prompt("openvino")], TOKENS)
    return made.text("openvino", tokens[0])


def test_the_text_is_the_same_in_five_runtimes(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing ends it before the last token, and without the adapter it is another text."""
    expected = by_torch(trained.work, capsys)
    assert len(trained.tokenizer("ort")(expected)["input_ids"]) >= 24
    assert expected != by_torch(trained.base, capsys)
    tokens, text = by_transformers_js(trained.exports["web"], tmp_path, PROMPT, TOKENS)
    assert len(tokens) == TOKENS
    found = {
        "onnxruntime": by_onnxruntime(trained),
        "onnxruntime-genai": by_genai_alone(trained),
        "transformers.js": text,
        "openvino": by_openvino_alone(trained),
    }
    assert found == dict.fromkeys(found, expected)
