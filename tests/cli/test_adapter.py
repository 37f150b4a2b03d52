"""`surgeon export --adapters slots` and `surgeon adapter`: from the command line to files that were proven."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.zoo.folders import folder_of
from benchmarks.zoo.oracles import nudged
from surgeon import api
from surgeon.cli.main import main
from surgeon.lower.onnx import adapter_file

Answer = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work folders of three adapters of one base, and of one of another base."""
    root = tmp_path_factory.mktemp("adapters")
    made: dict[str, tuple[str, str, dict[str, Any]]] = {
        "lora": ("llama", "lora", {"rank": 2}),
        "prefix": ("llama", "prefix", {"tokens": 3}),
        "dylora": ("llama", "dylora", {"rank": 4, "targets": "up_proj"}),
        "other": ("mistral", "lora", {"rank": 2}),
    }
    for name, (family, method, options) in made.items():
        nudged(api.apply(folder_of(family), method, **options), 0.1).save(root / name)
    return root


@pytest.fixture(scope="module")
def exported(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GroupQueryAttention: the prefix is what its cache starts with."""
    out = tmp_path_factory.mktemp("export") / "onnx"
    given = [word for name in ("lora", "prefix") for word in ("--adapter", str(folders / name))]
    assert main(["export", str(folder_of("llama")), "--adapters", "slots", *given, "-o", str(out)]) == 0
    return out


def test_the_manifest_says_what_was_proven(exported: Path) -> None:
    record = json.loads((exported / "surgeon.json").read_text())
    assert [record["slots"][word] for word in ("form", "prefix", "optional")] == ["slots", "initial", True]
    assert record["attention"]["operator"] == "com.microsoft.GroupQueryAttention"
    files = [adapter["file"] for adapter in record["adapters"]]
    assert files == ["adapters/lora.onnx_adapter", "adapters/prefix.onnx_adapter"]
    for verified in (record["verified"], *(adapter["verified"] for adapter in record["adapters"])):
        assert verified["token_agreement"] == 1.0
        assert verified["max_error"] <= verified["bound"]
        assert [len(batch["prompts"]) for batch in verified["batches"]] == [1, 3]
        assert all(len(row) == 20 for batch in verified["batches"] for row in batch["tokens"])
    loaded = adapter_file.load(exported / "adapters" / "prefix.onnx_adapter", exported)
    assert (loaded.length, len(loaded.initial), loaded.inputs) == (3, 8, {})
    assert loaded.past(2)["past_key_values.0.key"].shape == (2, 2, 3, 8)


def test_it_is_verified_again_with_its_adapters(exported: Path, run: Answer) -> None:
    assert run("verify", exported)["token_agreement"] == 1.0


def test_an_adapter_is_compiled_at_a_rank(exported: Path, folders: Path, tmp_path: Path, run: Answer) -> None:
    out = tmp_path / "x.onnx_adapter"
    found = run("adapter", folders / "dylora", "--for", exported, "--rank", 2, "-o", out)
    assert found["token_agreement"] == 1.0
    assert 0 < found["max_error"] <= found["bound"]
    assert (found["slots"], found["steps"], found["bytes"]) == (8, 20, out.stat().st_size)
    b = adapter_file.load(out, exported).inputs["model.layers.0.mlp.up_proj.lora_B"]
    assert b.any(1).sum() == 2


def test_two_side_by_side_are_one(exported: Path, folders: Path, tmp_path: Path, run: Answer) -> None:
    both = run("adapter", folders / "lora", folders / "prefix", "--for", exported, "-o", tmp_path / "x.safetensors")
    assert both["slots"] == 2 * 2 * 4 + 2 * 4
    loaded = adapter_file.load(tmp_path / "x.safetensors", exported)
    assert loaded.length == 3


@pytest.mark.parametrize(
    ("names", "options", "code", "said"),
    [
        (["lora", "lora"], [], 2, "two adapters claim the slot"),
        (["other"], [], 2, "another base"),
        (["missing"], [], 2, "no adapter"),
        (["lora"], ["-o", "x.bin"], 2, "end it with"),
        (["lora"], ["--rank", "9"], 2, "rank"),
        (["lora"], ["--for", "."], 2, "surgeon.json"),
    ],
)
def test_what_is_refused(
    names: list[str], options: list[str], code: int, said: str, exported: Path, folders: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = ["adapter", *(str(folders / name) for name in names), "--for", str(exported), *options]
    assert main(command) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert said in "".join(lines)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_over_integers_is_compiled_and_replayed(folders: Path, tmp_path: Path, run: Answer) -> None:
    """int4 with slots: an adapter of a later command is proven, and the folder is still what it was."""
    out, file = tmp_path / "onnx", tmp_path / "onnx" / "adapters" / "lora.onnx_adapter"
    made = run("export", folder_of("llama"), "--precision", "int4", "--adapters", "slots", "-o", out)
    assert {(row["how"], row["bits"]) for row in made["linears"]} == {("side", 4), ("quantise", 4)}
    assert run("verify", out)["token_agreement"] == 1.0
    found = run("adapter", folders / "lora", "--for", out, "-o", file)
    assert found["token_agreement"] == 1.0
    assert 0 < found["max_error"] <= found["bound"]
    again = run("verify", out)
    assert again["token_agreement"] == 1.0
    assert again["max_error"] <= again["bound"]
    assert adapter_file.load(file, out).inputs["model.layers.0.self_attn.q_proj.lora_B"].any()


def test_options_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = str(folder_of("llama")), str(tmp_path / "out")
    assert main(["export", base, "-o", out, "--targets", "q_proj"]) == 2
    assert "--adapters slots" in capsys.readouterr().err
    assert main(["export", base, "-o", out, "--target", "hf", "--adapters", "slots"]) == 2
    assert "--target onnx" in capsys.readouterr().err
    assert main(["export", base, "-o", out, "--adapters", "slotts"]) == 2
    assert "did you mean slots" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
