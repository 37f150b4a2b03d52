"""`surgeon plan` from a config alone: its JSON, its table, and its complaints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgeon.cli.main import main

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


def result(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    code = main([*args, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "plan", model, "--method", "vera", "--rank", "8")
    keys = {"method", "trainable_parameters", "stored_parameters", "sites", "bytes", "flops_per_token", "skipped"}
    assert keys <= set(found)
    assert found["method"] == "vera"
    assert found["trainable_parameters"] == 2 * (8 + 32 + 8 + 16)
    assert found["stored_parameters"] == found["trainable_parameters"] + 8 * (32 + 32)
    assert found["site_count"] == len(found["sites"]) == 4
    assert found["sites"][0] == {
        "path": "model.layers.0.self_attn.q_proj", "kind": "linear", "shape": [32, 32], "method": "vera", "rank": 8,
        "trainable_parameters": 40,
    }  # fmt: skip
    assert found["bytes"]["base"] == 2 * found["base_parameters"]


def test_the_table_has_a_line_for_each_kind_of_site(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--rank", "4", "--targets", "q_proj model.layers.1.mlp.up_proj"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "model.layers.*.self_attn.q_proj" in err
    assert "model.layers.1.mlp.up_proj" in err
    assert "832 parameters" in err


def test_flags_hold_for_every_method_and_parentheses_for_one(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["--method", "lora", "--method", "vera(rank=3, targets=up_proj)"]
    found = result(capsys, "plan", model, *methods, "--rank", "2", "--alpha", "4", "--rslora")
    assert found["methods"] == ["lora(rank=2, alpha=4.0, rslora=True)", "vera(targets='up_proj', rank=3)"]


@pytest.mark.parametrize(
    ("args", "what", "hint"),
    [
        (["--method", "lorra"], "unknown method 'lorra'", "lora"),
        (["--method", "kv_cache"], "kv_cache is not applied by its name", "lora"),
        (["--method", "vera", "--alpha", "3"], "vera: no option --alpha", "--rank"),
        (["--rnk", "3"], "no option --rnk", "--rank"),
        (["--rank", "many"], "--rank is 'many'", "whole number"),
        (["--rank", "0"], "lora: rank is 0", "at least 1"),
        (["--rank", "33"], "lora: rank 33 is above the size of the layer", "at most"),
        (["--targets", "qproj"], "no module matches 'qproj'", "q_proj"),
        (["--task", "chat"], "unknown task 'chat'", "causal-lm"),
    ],
)
def test_complaints(model: str, args: list[str], what: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, *args]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == what
    assert hint in lines[-1]


def test_a_folder_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
