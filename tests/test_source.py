"""Opening a base by its hub id, from the hub's cache without a network, and by a name that leads nowhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from benchmarks.zoo.folders import folder_of
from surgeon import planning
from surgeon.cli.main import main
from surgeon.errors import UsageError
from surgeon.remote_code import trust_remote_code
from surgeon.source import open_source, resolve

ID = "someone/tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    return tmp_path / "hub"


def downloaded(cache: Path) -> Path:
    """The snapshot of the tiny Llama, in the cache as the hub's client lays it out."""
    model = cache / "models--someone--tiny-llama"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder_of("llama"), model / "snapshots" / COMMIT))


def test_a_hub_id_is_its_snapshot_in_the_cache(cache: Path) -> None:
    snapshot = downloaded(cache)
    assert resolve(ID) == snapshot
    source = open_source(ID)
    assert source.folder == snapshot
    assert source.name == ID
    assert open_source(folder_of("llama")).name == "llama"
    assert source.checkpoint.fingerprint() == open_source(folder_of("llama")).checkpoint.fingerprint()


def test_without_a_network_what_is_not_in_the_cache_is_three_lines(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", ID]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert lines[0] == f"no folder {ID}, and it cannot be downloaded"
    assert "check the name and the network" in lines[2]
    assert not cache.exists()


def test_a_repository_of_pickles_is_refused(cache: Path) -> None:
    snapshot = downloaded(cache)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickle"):
        open_source(ID)
    (snapshot / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match="no weights") as caught:
        open_source(ID)
    assert "of a hub id nothing else is downloaded" in caught.value.hint


@pytest.mark.parametrize("name", ["nowhere", "./some/folder", "/no/folder", "a/b/c", "~/model"])
def test_what_is_no_hub_id_is_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UsageError, match="no folder"):
        resolve(name)


def test_only_what_is_needed_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **options: Any) -> str:
        assert name == ID
        asked.append(allow_patterns)
        return str(folder_of("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    open_source(ID)
    assert planning.plan(ID).base_parameters > 0
    with trust_remote_code():
        open_source(ID, weights=False)
    for patterns, has_weights, has_code in zip(asked, (True, False, False), (False, False, True), strict=True):
        assert {"*.json", "*.model", "*.txt", "*.jinja"} <= {*patterns}
        assert ("*.safetensors" in patterns, "*.py" in patterns) == (has_weights, has_code)
        assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".pt", ".ckpt"))]
