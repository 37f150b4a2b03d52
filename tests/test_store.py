"""Work folders: saved and opened to the same graph, replaced in one step, and refused when something does not fit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from benchmarks.zoo import build
from benchmarks.zoo.folders import base_of, captured, folder_of, reference
from benchmarks.zoo.graphs import randomised
from surgeon import passes, run, store
from surgeon.errors import SurgeonError, UnsupportedError, UsageError
from surgeon.fold import fold
from surgeon.graph import Graph
from surgeon.model import load_model

LORA = {"rank": 4, "targets": "*.{q,v}_proj"}
VERA = {"rank": 8, "targets": "*.{q,down}_proj", "key": 2}


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    monkeypatch.setattr("surgeon.store.open_graph", captured)


def adapted(*steps: tuple[str, dict[str, Any]], family: str = "llama") -> Graph:
    made = [passes.make(name, **options) for name, options in steps]
    return randomised(run.apply(base_of(family)[1], *made, seed=9))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good work folder, to be damaged."""
    return store.save(adapted(("lora", LORA)), tmp_path_factory.mktemp("good") / "work", seed=9)


@pytest.fixture
def copy(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work, tmp_path / "work"))


@torch.no_grad()
def logits(model: Any, graph: Graph) -> torch.Tensor:
    result: torch.Tensor = model(**build.tokens(graph.config, 2, 7)).logits
    return result


def test_a_work_folder_opens_to_the_same_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    graph = adapted(("lora", LORA))
    probes = [{"prompt": [3, 4], "tokens": [5]}]
    store.save(graph, tmp_path / "work", seed=9, probes=probes)
    again = store.load(tmp_path / "work")
    assert again.applied == graph.applied
    assert again.text() == graph.text()
    assert again.trainable() == graph.trainable()
    assert torch.equal(logits(load_model(again), graph), logits(load_model(graph), graph))
    record = json.loads((tmp_path / "work" / "surgery.json").read_text())
    assert record["schema"] == 1
    assert record["probes"] == probes
    assert record["passes"] == [
        {"id": "lora", "name": "lora", "folder": ".", "format": "peft",
         "options": graph.applied[0].options() | {"ranks": [], "alphas": [], "layouts": []}}
    ]  # fmt: skip
    assert set(record["versions"]) == {"surgeon", "torch", "transformers"}
    card = (tmp_path / "work" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert "lora(rank=4)" in card


def test_two_adapters_have_a_folder_each_that_peft_loads(tmp_path: Path) -> None:
    graph = adapted(("lora", LORA), ("vera", VERA), ("lora", LORA | {"targets": "o_proj"}))
    store.save(graph, tmp_path / "work")
    again = store.load(tmp_path / "work")
    assert [step.name for step in again.applied] == ["lora", "vera", "lora"]
    assert torch.equal(logits(load_model(again), graph), logits(load_model(graph), graph))
    model = reference(folder_of("llama"))
    for name in ("lora", "vera", "lora_2"):
        assert store.is_adapter_folder(tmp_path / "work" / name)
        model = peft.PeftModel.from_pretrained(model, tmp_path / "work" / name).merge_and_unload()
    assert torch.allclose(logits(model, graph), logits(load_model(graph), graph), atol=1e-5)
    merged = fold(again)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, merged.values[name]), name
    assert not store.is_adapter_folder(tmp_path / "work")
    assert "work/lora" not in (tmp_path / "work" / "README.md").read_text()


def test_saving_again_keeps_what_others_wrote(tmp_path: Path) -> None:
    place = store.save(adapted(("lora", LORA), ("vera", VERA)), tmp_path / "work", seed=4)
    (place / "checkpoint-5").mkdir()
    (place / "checkpoint-5" / "model.safetensors").write_bytes(b"state")
    (place / "loss.jsonl").write_text("{}\n")
    (place / f".checkpoint-6.tmp-{os.getpid()}-0a").mkdir()
    with pytest.raises(UsageError, match="not empty"):
        store.save(adapted(("lora", LORA)), place)
    graph = adapted(("lora", LORA))
    store.save(graph, place, overwrite=True)
    assert {entry.name for entry in place.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-5", "graph.txt", "loss.jsonl",
        "surgery.json",
    }  # fmt: skip
    assert (place / "checkpoint-5" / "model.safetensors").read_bytes() == b"state"
    assert json.loads((place / "surgery.json").read_text())["seed"] == 4
    assert torch.equal(logits(load_model(store.load(place)), graph), logits(load_model(graph), graph))


def test_a_folder_that_is_no_work_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(UsageError, match=r"no work folder: it holds a\.txt"):
        store.save(adapted(("lora", LORA)), tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "a.txt").read_text() == "dear"


def test_a_base_that_moved_with_its_work_folder_is_found(tmp_path: Path) -> None:
    shutil.copytree(folder_of("llama"), tmp_path / "one" / "base")
    graph = adapted(("lora", LORA))
    graph.source = str(tmp_path / "one" / "base")
    store.save(graph, tmp_path / "one" / "work")
    (tmp_path / "one").rename(tmp_path / "two")
    assert Path(store.load(tmp_path / "two" / "work").source).resolve() == tmp_path / "two" / "base"
    (tmp_path / "two" / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="base model is not there"):
        store.load(tmp_path / "two" / "work")
    assert store.load(tmp_path / "two" / "work", tmp_path / "elsewhere").source == str(tmp_path / "elsewhere")


def test_another_base_is_refused(copy: Path, tmp_path: Path) -> None:
    other = build.save(build.build(base_of("llama")[1].config, seed=5), tmp_path / "other")
    with pytest.raises(UsageError, match="other values") as caught:
        store.load(copy, other)
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(UsageError, match="other names, dtypes or shapes"):
        store.load(copy, folder_of("opt"))


def changed(copy: Path, **fields: Any) -> None:
    record = json.loads((copy / "surgery.json").read_text())
    (copy / "surgery.json").write_text(json.dumps({**record, **fields}))


def test_a_graph_that_comes_out_different_shows_the_difference(copy: Path) -> None:
    text = (copy / "graph.txt").read_text()
    (copy / "graph.txt").write_text(text.replace("aten.silu", "aten.gelu", 1))
    changed(copy, graph="0" * 64)
    with pytest.raises(SurgeonError, match="comes out different") as caught:
        store.load(copy)
    assert "gelu" in caught.value.what
    assert "silu" in caught.value.what
    (copy / "graph.txt").unlink()
    with pytest.raises(SurgeonError, match="comes out different"):
        store.load(copy)


DAMAGE: dict[str, tuple[type[SurgeonError], Callable[[Path], object]]] = {
    "has no surgery.json": (UsageError, lambda folder: (folder / "surgery.json").unlink()),
    "not valid JSON": (UsageError, lambda folder: (folder / "surgery.json").write_text("{")),
    "no schema version": (UsageError, lambda folder: (folder / "surgery.json").write_text("[]")),
    "has schema 2": (UnsupportedError, lambda folder: changed(folder, schema=2)),
    "surgery.json is damaged": (UsageError, lambda folder: changed(folder, passes=[{"nonsense": 1}])),
    "damaged: .*relative": (UsageError, lambda folder: changed(folder, base={"path": "x"})),
    "unknown method": (UsageError, lambda folder: changed(folder, passes=[{"id": "x", "name": "x", "options": {}}])),
    "has no adapter_model": (UsageError, lambda folder: (folder / "adapter_model.safetensors").unlink()),
    "has no adapter_config": (UsageError, lambda folder: (folder / "adapter_config.json").unlink()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_work_folders_are_refused(what: str, copy: Path) -> None:
    kind, damage = DAMAGE[what]
    damage(copy)
    with pytest.raises(kind, match=what) as caught:
        store.load(copy)
    assert len(str(caught.value).splitlines()) == 3


def test_there_must_be_something_to_save(tmp_path: Path) -> None:
    plain = base_of("llama")[1]
    with pytest.raises(UsageError, match="nothing to save"):
        store.save(plain, tmp_path / "work")
    graph = adapted(("lora", LORA))
    graph.source = ""
    with pytest.raises(UsageError, match="no base on disk"):
        store.save(graph, tmp_path / "work")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from surgeon import atomic, store
from surgeon.passes import make
from surgeon.run import apply
from surgeon.source import open_graph, open_source

graph = apply(open_graph(open_source(sys.argv[1])), make("lora", rank=2))
sync = atomic._sync_tree
def kill(folder):
    sync(folder)
    os.kill(os.getpid(), signal.SIGKILL)
atomic._sync_tree = kill
store.save(graph, sys.argv[2], overwrite=True)
"""


def test_a_kill_leaves_the_old_folder(copy: Path) -> None:
    (copy / "checkpoint-1").mkdir()
    (copy / "checkpoint-1" / "state").write_text("old")
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder_of("llama")), str(copy)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before
    assert len(list(copy.parent.iterdir())) == 2
    graph = store.load(copy)
    store.save(graph, copy, overwrite=True)
    assert [path.name for path in copy.parent.iterdir()] == ["work"]
    assert (copy / "checkpoint-1" / "state").read_text() == "old"
