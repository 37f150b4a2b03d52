"""Artifacts: token-equal to what they were made from, on a machine that has neither a GPU, Triton nor transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgeon import generate, module
from surgeon.artifact import manifest as form
from surgeon.artifact.binaries import Binaries
from surgeon.artifact.program import from_json
from surgeon.artifact.runtime import Artifact, open_artifact
from surgeon.errors import CheckFailed, SurgeonError, UnsupportedError, UsageError
from surgeon.lower import launches, triton
from surgeon.lower.triton import export_triton
from tests.artifact.conftest import adapted
from tests.artifact.test_driver import Fake, library

__all__ = ["library"]
PROMPTS = [[5, 17, 3], [9], list(range(3, 25))]


def continued(graph: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """By Hugging Face's `generate` over the graph, one prompt after another."""
    model, found = generate.generator(module.load(graph)), []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
        found.append(made[0, len(prompt) :].tolist())
    return found


def test_a_batch_is_token_equal_to_the_model(merged: Path) -> None:
    graph = adapted("llama", ("lora", {"rank": 3, "targets": "*.{q,k,v}_proj"}))
    artifact = open_artifact(merged)
    wanted = continued(graph, PROMPTS, 12)
    assert artifact.generate(PROMPTS, 12) == wanted
    assert artifact.generate(PROMPTS[:1], 12, stop=[wanted[0][4]]) == [wanted[0][: wanted[0].index(wanted[0][4]) + 1]]
    assert artifact.arch == ""
    assert artifact.replay().exact == 1.0


def test_logits_are_those_of_the_model(merged: Path) -> None:
    graph = adapted("llama", ("lora", {"rank": 3, "targets": "*.{q,k,v}_proj"}))
    ids = torch.tensor([PROMPTS[2]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(len(ids[0]))[None]}
    wanted = module.load(graph)(*(given[name] for name in graph.inputs))[0][0, -1]
    torch.testing.assert_close(open_artifact(merged).logits(PROMPTS[2]), wanted, atol=2e-5, rtol=1e-4)


FORMS: dict[str, tuple[str, list[tuple[str, dict[str, Any]]], bool | None]] = {
    "prefix over windows": ("mistral", [("prefix", {"tokens": 5})], None),
    "lora and prefix, both beside": ("llama", [("lora", {"targets": "*.{gate,up}_proj"}), ("prefix", {})], True),
}
MORE: dict[str, tuple[str, list[tuple[str, dict[str, Any]]], bool | None]] = {
    "prompt": ("gpt2", [("prompt", {"tokens": 4})], None),
    "vera beside": ("llama", [("vera", {"rank": 12})], True),
    "dora beside": ("llama", [("dora", {"rank": 4})], True),
    "softcaps": ("gemma2", [], None),
    "int4": ("llama", [("intq", {"bits": 4}), ("lora", {})], None),
    "experts": ("mixtral", [], None),
    "partial rotary": ("gpt_neox", [], None),
    "positions by mask": ("opt", [], None),
    "sinks": ("gpt_oss", [], None),
    "values narrower than keys": ("deepseek_v3", [], None),
    "layers that share keys": ("gemma3n_text", [], None),
}


@pytest.mark.parametrize(("family", "steps", "keep"), FORMS.values(), ids=FORMS)
def test_forms_are_token_equal(family: str, steps: Any, keep: bool | None, tmp_path: Path) -> None:
    check(family, steps, keep, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "steps", "keep"), MORE.values(), ids=MORE)
def test_more_forms_are_token_equal(family: str, steps: Any, keep: bool | None, tmp_path: Path) -> None:
    check(family, steps, keep, tmp_path)


def check(family: str, steps: Any, keep: bool | None, tmp_path: Path) -> None:
    graph = adapted(family, *steps)
    report = export_triton(graph, tmp_path / "artifact", arch=[], keep_adapter=keep)
    assert report.replay is not None
    assert report.replay.exact == 1.0
    if keep is None and not any(name in ("nf4", "intq") for name, _ in steps):
        assert not report.adapter
    assert open_artifact(tmp_path / "artifact").generate(PROMPTS, 6) == continued(graph, PROMPTS, 6)


def on_fake(folder: Path, driver: Fake, arch: str = "sm_90") -> Artifact:
    """The artifact as a GPU of this architecture would run it, on a driver that runs nothing."""
    manifest = form.read_manifest(folder)
    values = {name: value.clone() for name, value in load_file(folder / form.WEIGHTS).items()}  # aligned
    program = from_json(form.read_program(folder, manifest), values, str(folder))
    made = Binaries(folder, manifest.kernels, arch, False, driver, lambda: 0)
    return Artifact(folder, manifest, program, torch.device("cpu"), made)


def test_every_launch_of_a_gpu_has_a_binary(beside: Path, library: Path) -> None:
    driver = Fake(str(library))
    driver._library.fake_clear()
    driver.kinds("")
    artifact = on_fake(beside, driver)
    artifact.generate([[5, 6, 7]], 3)
    artifact.generate([[5] * 40, [1], [2, 3]], 2)
    names = {line.split()[1] for line in driver.journal if line.startswith("launch")}
    assert names == {"attend", "join", "down", "up", "nf4_dequantise_kernel"}
    first = next(line for line in driver.journal if line.startswith("launch down"))
    assert first.startswith("launch down grid 1 1 4"), "three ranks for each of q, k and v in one product of 9"


def test_manifest_names_every_file(beside: Path) -> None:
    found = json.loads((beside / form.FILE).read_text())
    assert found["archs"] == ["sm_80", "sm_90"]
    assert found["schema"] == 1
    for record in found["kernels"]:
        assert form.digest((beside / record["file"]).read_bytes()) == record["sha256"]
        assert (record["target"] == "sm_80") == ("ptx" in record)
        assert {"symbol", "threads", "shared", "arguments", "trailing", "constants", "divisible", "grid"} <= set(record)
    on_disk = {str(path.relative_to(beside)) for path in beside.glob("kernels/*/*")}
    assert on_disk == {record[key] for record in found["kernels"] for key in ("file", "ptx") if key in record}


BLOCKED = """
import sys
sys.modules["transformers"] = sys.modules["triton"] = sys.modules["peft"] = None
from surgeon.artifact.runtime import open_artifact
artifact = open_artifact(sys.argv[1], "cpu")
assert artifact.replay().exact == 1.0
print(artifact.generate([[5, 17, 3]], 4))
"""


def test_runs_without_transformers_and_triton(merged: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED, merged], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == open_artifact(merged).generate([[5, 17, 3]], 4)


def test_a_program_calls_nothing_but_operators(merged: Path) -> None:
    manifest = form.read_manifest(merged)
    found, values = form.read_program(merged, manifest), load_file(merged / form.WEIGHTS)
    for name in ("os.system", "operator.methodcaller", "builtins.eval", "aten.no_such_operator.default"):
        found["trunk"][-2][2] = name
        with pytest.raises(UnsupportedError, match=r"may not call|is not here"):
            from_json(found, values, str(merged))
    found["trunk"][-2][2:4] = ["builtins.getattr", [{"node": 0}, "__class__"]]
    with pytest.raises(UnsupportedError, match="may not call getattr of __class__"):
        from_json(found, values, str(merged))


def broken(folder: Path, kind: str) -> None:
    """Damage an artifact."""
    manifest = json.loads((folder / form.FILE).read_text())
    weights = folder / form.WEIGHTS
    if kind == "newer":
        (folder / form.FILE).write_text(json.dumps({**manifest, "schema": 2}))
    elif kind == "no manifest":
        (folder / form.FILE).unlink()
    elif kind == "half a manifest":
        (folder / form.FILE).write_text((folder / form.FILE).read_text()[:200])
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        weights.unlink()
    else:
        text = (folder / form.PROGRAM).read_text()
        (folder / form.PROGRAM).write_text(text.replace("aten.silu.default", "aten.relu.default"))


DAMAGE = {
    "newer": (UnsupportedError, "schema 2, this surgeon reads up to 1"),
    "no manifest": (UsageError, r"no manifest\.json"),
    "half a manifest": (UsageError, "is damaged"),
    "truncated": (UsageError, r"has \d+ of \d+ bytes"),
    "no weights": (UsageError, "is missing"),
    "another program": (UsageError, "was changed after the export"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_artifact(kind: str, merged: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(merged)
    broken(folder, kind)
    error, words = DAMAGE[kind]
    with pytest.raises(error, match=words) as caught:
        open_artifact(folder)
    assert len(str(caught.value).splitlines()) == 3


def test_too_little_memory() -> None:
    with pytest.raises(SurgeonError, match=r"takes 3\.00 GiB of GPU memory, and 1\.00 GiB are free") as caught:
        form.require_memory(3 * 2**30, 2**30, "the model", "artifact/")
    assert len(str(caught.value).splitlines()) == 3


def test_bad_requests(merged: Path) -> None:
    artifact = open_artifact(merged)
    with pytest.raises(UsageError, match="a prompt is empty"):
        artifact.generate([[]], 3)
    with pytest.raises(UsageError, match="no tokenizer"):
        artifact.tokenizer()
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="no GPU here"):
            open_artifact(merged, "cuda")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": ["gfx942"]}, "runs on NVIDIA GPUs; gfx942 is none"),
        ({"arch": ["sm_75"]}, "sm_75 has no bf16 tensor cores"),
        ({"arch": ["hopper"]}, "no architecture 'hopper'"),
        ({"precision": "int8"}, "no precision int8"),
    ],
)
def test_bad_exports(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SurgeonError, match=words):
        export_triton(adapted("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["bloom", "bert"])
def test_models_without_a_form(family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        export_triton(adapted(family), tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 3
    assert not (tmp_path / "out").exists()


def test_a_wrong_artifact_is_not_kept(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [form.Probe([5, 17, 3], [0, 0, 0], [9.0, 9.0, 9.0])]
    monkeypatch.setattr(triton, "_probes", lambda *_: (wrong, 0.0))
    monkeypatch.setattr(triton, "compiled", lambda *_: [])
    with pytest.raises(CheckFailed, match="generates other tokens"):
        export_triton(adapted("llama"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_binary_that_spills_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that cannot be launched is not."""
    built = iter(
        [CheckFailed("spills"), SimpleNamespace(spilled=8), CheckFailed("scratch"), SimpleNamespace(spilled=0)]
    )

    def build(*_: Any, **__: Any) -> Any:
        found = next(built)
        if isinstance(found, CheckFailed):
            raise found
        return found

    monkeypatch.setattr(launches, "build", build)
    assert launches.compiled([SimpleNamespace()], ["sm_80"])[0].spilled == 8  # type: ignore[list-item]
    with pytest.raises(CheckFailed, match="scratch"):
        launches.compiled([SimpleNamespace()], ["sm_80"])  # type: ignore[list-item]


def test_ties() -> None:
    probe = form.Probe([1], [4, 5, 6, 7], [1.0, 0.01, 1.0, 1.0])
    assert form.agreement(probe, [4, 5, 6, 7], 0.1) == 1.0
    assert form.agreement(probe, [4, 9, 9, 9], 0.1) == 1.0, "a tie may fall either way"
    assert form.agreement(probe, [4, 5, 9, 9], 0.1) == 0.5
    assert form.agreement(probe, [4], 0.1) == 0.25


def test_no_path_of_this_machine_is_written(merged: Path, repo: Path) -> None:
    for path in merged.rglob("*.json"):
        assert str(repo) not in path.read_text()
    assert shutil.which("python") not in (merged / form.FILE).read_text()
