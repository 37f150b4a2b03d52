"""`surgeon export`: from the command line to a folder that runs, or three lines and nothing."""

from __future__ import annotations

import builtins
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir
import pytest

from benchmarks.zoo import build, graphs
from surgeon import api, lower
from surgeon.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.save(graphs.model_of("llama"), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def work(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = api.apply(base, "lora", rank=4, targets="all-linear")
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            parameter.data += 0.1
    return model.save(tmp_path_factory.mktemp("work") / "work")


def test_a_work_folder_becomes_onnx(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "onnx"
    assert main(["export", str(work), "--target", "onnx", "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_agreement"] == 1.0
    assert 0 < found["max_error"] <= found["bound"]
    assert found["seconds"] > 0
    assert found["peak_rss_bytes"] > 1e8
    assert found["steps"] == 20
    assert sorted(found["files"]) == sorted(path.name for path in out.iterdir())
    for path in out.iterdir():
        assert str(work).encode() not in path.read_bytes()


def test_opset_23_is_onnx_alone(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Llama with grouped heads, alone and padded on the left, and the same replayed from its folder."""
    out = tmp_path / "onnx"
    assert main(["export", str(work), "--opset", "23", "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["opset"], found["attention"], found["fallbacks"]) == (23, "fused", {})
    assert (found["profile"], found["token_agreement"]) == ("ort", 1.0)
    assert 0 < found["max_error"] <= found["bound"]
    model = onnx_ir.load(out / "model.onnx")
    assert model.opset_imports == {"": 23}
    kinds = Counter(node.op_type for node in model.graph)
    assert [kinds[kind] for kind in ("Attention", "RotaryEmbedding", "RMSNormalization")] == [4, 8, 9]
    assert json.loads((out / "surgeon.json").read_text())["opset"] == 23
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_agreement"] == 1.0


@pytest.fixture(scope="module")
def virtual(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with an MLP's prefix, a prompt and a LoRA."""
    model = api.apply(base, "prefix", tokens=3, hidden=6, dropout=0.1)
    model = api.apply(api.apply(model, "prompt", tokens=2, init="normal"), "lora", rank=2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            parameter.data += 0.1
    return model.save(tmp_path_factory.mktemp("virtual") / "work")


def test_virtual_tokens_become_constants(virtual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "onnx"
    assert main(["export", str(virtual), "--target", "onnx", "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_agreement"] == 1.0
    assert 0 < found["max_error"] <= found["bound"]
    model = onnx_ir.load(out / "model.onnx")
    constants = {name: tuple(value.shape) for name, value in model.graph.initializers.items() if ".prefix" in name}
    assert sorted(constants.values()) == sorted([(2, 3, 8), (2, 2, 8)] * 2 * 4)  # K and V of four layers, no MLP
    assert [value.name for value in model.graph.inputs][:4] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key"
    ]  # fmt: skip
    manifest = json.loads((out / "surgeon.json").read_text())
    assert [step["name"] for step in manifest["passes"]] == ["prefix", "prompt", "lora"]


def test_hf_leaves_virtual_tokens_beside(virtual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hf"
    assert main(["export", str(virtual), "--target", "hf", "-o", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["not_folded"], found["adapter_folder"]) == (["prefix", "prompt"], str(out / "adapter"))
    assert main(["verify", str(virtual), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_hf_is_merge(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(work), "--target", "hf", "-o", str(tmp_path / "hf"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"max_error", "bound", "token_agreement", "seconds", "peak_rss_bytes"} <= set(found)
    assert (tmp_path / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--target", "onxx"], 2, "onnx"),
        (["--precision", "fp61"], 2, "fp16"),
        (["--four-bit", "int5"], 2, "bnb4"),
        (["--opset", "22"], 2, "--opset 21 or 23"),
        (["--profile", "web", "--opset", "99"], 2, "--opset 21 or 23"),
        (["--target", "hf", "--opset", "23"], 2, "leave it out"),
    ],
)
def test_wrong_options_suggest_right_ones(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    assert main(["export", str(base), "-o", str(tmp_path / "out"), *options]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert said in lines[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("keep")
    assert main(["export", str(base), "-o", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_package_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "onnxscript":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, lower.TARGETS["onnx"], raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["export", str(base), "-o", str(tmp_path / "out")]) == 3
    assert "pip install model-surgeon[onnx]" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from surgeon import atomic
from surgeon.cli.main import main

sync = atomic._sync_tree
def kill(folder):
    sync(folder)
    os.kill(os.getpid(), signal.SIGKILL)
atomic._sync_tree = kill
main(sys.argv[1:])
"""


@pytest.mark.parametrize("target", ["onnx", "hf"])
def test_a_kill_leaves_the_old_folder(work: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("old")
    command = ["export", str(work), "--target", target, "-o", str(out), "--overwrite", "--no-verify"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert len(list(tmp_path.iterdir())) == 2  # and what was being written, which the next command sweeps
    assert main([*command]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "mine" not in [path.name for path in out.iterdir()]


FULL = """
import resource, sys
from surgeon.cli.main import main

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("target", ["onnx", "hf"])
def test_a_full_disk_leaves_nothing(work: Path, tmp_path: Path, target: str) -> None:
    command = ["export", str(work), "--target", target, "-o", str(tmp_path / "out")]
    full = subprocess.run([sys.executable, "-c", FULL, *command], capture_output=True, text=True, check=False)
    assert full.returncode == 1
    lines = full.stderr.strip().splitlines()[-3:]
    assert lines[0].startswith("the disk is full")
    assert str(tmp_path / "out") in lines[1]
    assert list(tmp_path.iterdir()) == []
