"""Adapters for vLLM and SGLang: written as LoRA where they are one, refused by name where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from benchmarks.zoo.folders import folder_of
from benchmarks.zoo.graphs import randomised
from surgeon import api, lower, run, store
from surgeon.cli.main import main
from surgeon.errors import UnsupportedError
from surgeon.passes import make

pytestmark = pytest.mark.usefixtures("captured_once")


def work(tmp_path: Path, *methods: tuple[str, dict[str, Any]]) -> Path:
    graph = api.read(folder_of("llama"), "causal-lm")
    trained = randomised(run.apply(graph, *(make(name, **options) for name, options in methods)))
    return store.save(trained, tmp_path / "work")


@pytest.mark.parametrize(("engine", "method"), [("vllm", "vera"), ("sglang", "adalora"), ("vllm", "dylora")])
def test_what_is_a_lora_is_written_as_one(engine: str, method: str, tmp_path: Path) -> None:
    folder = work(tmp_path, (method, {"targets": "*.{q,v}_proj", "rank": 4} if method != "adalora" else {}))
    report = lower.export(folder, tmp_path / "poet", target=engine)
    config = json.loads((tmp_path / "poet" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    assert config["bias"] == "none"
    assert report.modules == ("q_proj", "v_proj")
    assert f"poet={tmp_path / 'poet'}" in report.command
    assert ("--lora-target-modules q_proj v_proj" in report.command) is (engine == "sglang")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_of("llama"))
    served = peft.PeftModel.from_pretrained(model, tmp_path / "poet").eval()
    ids = torch.tensor([[5, 9, 40, 7, 33]])
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, api.load(folder)(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


def test_flags_name_a_rank_the_engine_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = work(tmp_path, ("lora", {"rank": 5}), ("lora", {"rank": 4, "targets": "*.{q,k}_proj"}))
    assert main(["export", str(folder), "--target", "vllm", "-o", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rank"] == 9
    assert "--max-lora-rank 16" in told["command"]
    assert told["method"] == "lora + lora"


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("dora", {}, "whole matrix|scales"),
        ("prefix", {}, "prefix changes no weight"),
        ("lora", {"modules_to_save": "lm_head"}, "lm_head.weight was trained whole"),
        ("lora", {"targets": "lm_head"}, "lm_head is in none"),
        ("lora", {"targets": "*.embed_tokens"}, "no linear but embedding"),
    ],
)
def test_what_the_engine_would_reject_is_refused(
    method: str, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = work(tmp_path, (method, options))
    with pytest.raises(UnsupportedError, match=told) as caught:
        lower.export(folder, tmp_path / "out", target="vllm")
    assert "merge" in caught.value.hint or "rank" in caught.value.hint
    assert not (tmp_path / "out").exists()
