"""An export replayed later: with ONNX Runtime alone, elsewhere, and not if anything about it has changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgeon.cli.main import main
from surgeon.errors import CheckFailed, SurgeonError, UnsupportedError, UsageError
from surgeon.lower.onnx import prepack
from surgeon.lower.onnx.files import MANIFEST
from surgeon.lower.onnx.verify import verify
from tests.lower.onnx.conftest import Bound

ALONE = """
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "huggingface_hub"):
    sys.modules[name] = None
from surgeon.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def moved(bound: Bound, tmp_path: Path) -> Path:
    """A copy of an export, weights included."""
    shutil.copytree(bound.report.folder, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def alone(*words: str) -> subprocess.CompletedProcess[str]:
    """A command where neither torch nor transformers can be imported."""
    return subprocess.run([sys.executable, "-c", ALONE, *words], capture_output=True, text=True, timeout=300)


def record(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads((folder / MANIFEST).read_text())
    change(found)
    (folder / MANIFEST).write_text(json.dumps(found))


def test_with_onnxruntime_alone_it_computes_what_it_did(bound: Bound, moved: Path) -> None:
    done = alone("verify", str(moved), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert found["token_agreement"] == 1.0
    assert found["max_error"] <= 1e-4 < found["bound"] * 100
    assert found["probes"] == sum(len(batch.prompts) for batch in bound.report.replay.batches)  # type: ignore[union-attr]
    assert found["files"] == len(bound.report.files) - 1


def test_prepacked_it_computes_the_same_without_the_checkpoint(moved: Path) -> None:
    done = alone("prepack", str(moved), "--json")
    assert done.returncode == 0, done.stderr
    here = moved.with_name("elsewhere-prepacked")
    assert sorted(path.name for path in here.iterdir()) == [
        "config.json", "generation_config.json", "model.onnx", prepack.DATA, "surgeon.json",
    ]  # fmt: skip
    assert json.loads((here / MANIFEST).read_text())["prepacked"] == prepack.machine()
    with pytest.raises(UsageError, match="prepacked already"):
        prepack.prepack(here, here.with_name("twice"))
    record(here, lambda found: found["prepacked"].update(onnxruntime="1.0.0"))
    with pytest.raises(UnsupportedError, match=r"prepacked for onnxruntime 1\.0\.0 on"):
        verify(here)


def flipped(folder: Path) -> None:
    file = folder / "weights" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 0xFF
    file.write_bytes(data)


def shortened(folder: Path) -> None:
    file = folder / "weights" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_logits(found: dict[str, Any]) -> None:
    found["verified"]["batches"][0]["best_logits"][0][3] += 1.0


def other_tokens(found: dict[str, Any]) -> None:
    batch = found["verified"]["batches"][1]
    batch["tokens"][0][2] = (batch["tokens"][0][2] + 1) % 90


BAD: dict[str, tuple[Callable[[Path], Any], type[SurgeonError], str]] = {
    "changed": (flipped, UsageError, "weights/model.safetensors was changed after the export"),
    "truncated": (shortened, UsageError, r"weights/model.safetensors has [\d,]+ of [\d,]+ bytes"),
    "without its weights": (lambda f: shutil.rmtree(f / "weights"), UsageError, "lacks weights/model.safetensors"),
    "newer": (lambda f: record(f, lambda r: r.update(schema=99)), UnsupportedError, "schema 99"),
    "no record": (lambda f: (f / MANIFEST).unlink(), UsageError, "no surgeon.json"),
    "damaged record": (lambda f: (f / MANIFEST).write_text("{"), UsageError, "is damaged"),
    "unverified": (lambda f: record(f, lambda r: r.update(verified=None)), UsageError, "there are no probes"),
    "other logits": (lambda f: record(f, other_logits), CheckFailed, "computes something else"),
    "other tokens": (lambda f: record(f, other_tokens), CheckFailed, "computes something else"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_three_lines(case: str, moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, kind, message = BAD[case]
    spoil(moved)
    with pytest.raises(kind, match=message):
        verify(moved).require(str(moved))
    assert main(["verify", str(moved)]) == kind.exit_code
    said = capsys.readouterr().err.strip().splitlines()[-3:]
    assert not said[0].startswith(" ")
    assert said[1].strip().startswith("where:")
    assert said[2].strip().startswith("try:")


def test_a_model_that_this_runtime_cannot_read(moved: Path) -> None:
    (moved / "model.onnx").write_bytes(b"no model")
    size = {"bytes": 8, "sha256": None}
    record(moved, lambda found: found["files"].update({"model.onnx": size}))
    with pytest.raises(UnsupportedError, match="ONNX Runtime"):
        verify(moved)
