"""Code beside a checkpoint runs where the user says so, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import dynamic_module_utils

from benchmarks.zoo import build, families
from surgeon import api
from surgeon.cli.main import OPENING, load, main
from surgeon.errors import UsageError
from surgeon.remote_code import is_trusted, trust_remote_code
from surgeon.source import open_source

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "of_its_own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        result = super().forward(input_ids, attention_mask, position_ids, **kwargs)
        result.logits = result.logits * 2
        return result
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose logits its own code doubles."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = build.save(build.build(families.tiny_config("llama"), "causal-lm"), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"], config["architectures"] = "of_its_own", ["OwnForCausalLM"]
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING)
    return folder


def test_the_default_is_no(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_trusted()
    for command in (["plan", str(own)], ["apply", str(own), "-o", str(tmp_path / "work")], ["chat", str(own)]):
        assert main(command) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 3
        assert "transformers does not know of_its_own" in lines[0]
        assert "configuration_own.py, modeling_own.py" in lines[1]
        assert "--trust-remote-code" in lines[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_with_the_flag_the_model_is_its_own_code(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work"
    assert main(["plan", str(own), "--trust-remote-code", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "of_its_own"
    assert main(["apply", str(own), "--rank", "2", "-o", str(work), "--trust-remote-code"]) == 0
    assert not is_trusted()
    with pytest.raises(UsageError, match="does not know"):
        api.load(work)
    with trust_remote_code():
        model = api.load(work).eval()
    plain = transformers.LlamaForCausalLM.from_pretrained(own).eval()
    ids = torch.randint(5, 90, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, 2 * plain(input_ids=ids).logits)


def test_code_that_transformers_does_not_need_stays_unused(own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    (own / "configuration_own.py").write_text("raise SystemExit('this ran')")
    source = open_source(own, "causal-lm")
    assert type(source.config) is transformers.LlamaConfig


def test_a_tokenizer_of_its_own_is_refused_too(own: Path, tmp_path: Path) -> None:
    (own / "tokenization_own.py").write_text("raise SystemExit('this ran')")
    own_class = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (own / "tokenizer_config.json").write_text(json.dumps(own_class))
    with pytest.raises(UsageError, match="tokenizer needs its own code") as caught:
        api.tokenizer_of(own)
    assert "--trust-remote-code" in caught.value.hint


def test_commands_that_open_models_have_the_flag() -> None:
    for name in OPENING:
        assert any("--trust-remote-code" in parameter.opts for parameter in load(name).params), name
    assert not any("--trust-remote-code" in parameter.opts for parameter in load("doctor").params)
