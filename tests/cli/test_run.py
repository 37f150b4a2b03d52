"""`surgeon export --target triton` and `surgeon run`: from the command line to tokens, or three lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgeon import api
from surgeon.cli.main import main


@pytest.fixture(scope="module")
def work(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = api.apply(tiny_llama, "lora", rank=3)
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            parameter.data += 0.1
    return model.save(tmp_path_factory.mktemp("work") / "work")


@pytest.fixture(scope="module")
def artifact(work: Path) -> Path:
    out = work.parent / "artifact"
    assert main(["export", str(work), "--target", "triton", "--arch", "sm_80", "-o", str(out), "--json"]) == 0
    return out


def test_export_says_what_it_wrote(work: Path, tmp_path: Path, run: Any) -> None:
    options = ("--target", "triton", "--arch", "sm_80", "--keep-adapter", "--precision", "fp32")
    found = run("export", work, *options, "-o", tmp_path / "out")
    assert found["archs"] == ["sm_80"]
    assert found["precision"] == "fp32"
    assert found["token_agreement"] == 1.0
    assert found["tokens"] == 48
    assert found["adapter"] == "beside the base"
    assert found["binaries"] >= 5
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_run_replays_the_probes(artifact: Path, run: Any) -> None:
    found = run("run", artifact)
    assert found["token_agreement"] == found["exact"] == 1.0
    assert found["runs"] == "reference"


def test_run_generates(artifact: Path, work: Path, run: Any) -> None:
    found = run("run", artifact, "--ids", "5,17,3", "--ids", "9", "--tokens", 6)
    assert [len(row) for row in found["ids"]] == [6, 6] or 2 in {row[-1] for row in found["ids"]}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--ids", "5;17"], "'5;17' is no list of token ids"),
        (["--prompt", "x"], "the artifact has no tokenizer"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--device", "nowhere"], "there is no device 'nowhere'"),
    ],
)
def test_bad_requests(args: list[str], words: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(artifact), *args]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[0]
    assert len(lines) <= 3


def test_an_artifact_that_says_something_else(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels").mkdir()
    for name in ("program.json", "weights.safetensors"):
        (tmp_path / name).symlink_to(artifact / name)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["probes"][0]["tokens"][0] ^= 1
    manifest["probes"][0]["margins"][0] = 9.0
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert main(["run", str(tmp_path)]) == 1
    assert "generates other tokens" in capsys.readouterr().err


def test_options_of_another_target(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(work), "--target", "hf", "--arch", "sm_90", "-o", str(tmp_path / "out")]) == 2
    assert "--arch is for --target triton" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
