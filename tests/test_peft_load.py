"""What is wrong with an adapter folder is named, in three lines, and what is not supported is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.zoo.folders import base_of, captured
from benchmarks.zoo.graphs import randomised
from surgeon import passes, run, store
from surgeon.errors import CheckFailed, UnsupportedError, UsageError


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", captured)


def read(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good LoRA of the Llama, to be damaged."""
    place = tmp_path_factory.mktemp("adapter") / "work"
    step = passes.make("lora", rank=4)
    return store.save(randomised(run.apply(base_of("llama")[1], step)), place)


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "trainable_token_indices": {"trainable_token_indices": {"nowhere": [1]}},
    "layer_replication": {"layer_replication": [[0, 2]]},
    "init_lora_weights": {"init_lora_weights": "pissa_niter_4"},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "some_new_method": {"some_new_method": True},
    "bias": {"bias": "sometimes"},
    "OFT": {"peft_type": "OFT"},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(field: str, adapter: Path, tmp_path: Path) -> None:
    place = shutil.copytree(adapter, tmp_path / "work")
    (place / "adapter_config.json").write_text(json.dumps({**read(place), **UNSUPPORTED[field]}))
    with pytest.raises(UnsupportedError, match=field) as caught:
        store.load_adapter(place)
    assert len(str(caught.value).splitlines()) == 3


def _without(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]]] = {
    "missing adapter key": (KEY, lambda t: _without(t, KEY)),
    "unexpected adapter key": (
        "elsewhere",
        lambda t: {**t, "base_model.model.elsewhere.lora_A.weight": t[KEY].clone()},
    ),
    "NaN or Inf": (KEY, lambda t: {**t, KEY: t[KEY] * float("nan")}),
    "in the adapter": (KEY, lambda t: {**t, KEY: t[KEY][:3].clone()}),
    "not floating point": (KEY, lambda t: {**t, KEY: t[KEY].to(torch.int32)}),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_tensors_are_named(what: str, adapter: Path, tmp_path: Path) -> None:
    place = shutil.copytree(adapter, tmp_path / "work")
    name, change = DAMAGE[what]
    save_file(change(load_file(place / "adapter_model.safetensors")), place / "adapter_model.safetensors")
    for load in (store.load_adapter, store.load):
        with pytest.raises(UsageError, match=what) as caught:
            load(place)
        assert name in str(caught.value)
        assert len(str(caught.value).splitlines()) == 3


def test_a_whole_table_beside_the_adapter_must_be_the_bases_own(adapter: Path, tmp_path: Path) -> None:
    place = shutil.copytree(adapter, tmp_path / "work")
    file, key = place / "adapter_model.safetensors", "base_model.model.model.embed_tokens.weight"
    tensors, table = load_file(file), base_of("llama")[1].values["model.embed_tokens.weight"]
    save_file({**tensors, key: table}, file)
    assert "model.embed_tokens.weight" not in store.load_adapter(place).trainable()
    save_file({**tensors, key: table + 1}, file)
    with pytest.raises(UnsupportedError, match="not the base's own"):
        store.load_adapter(place)
    save_file({**tensors, key: torch.cat([table, table])}, file)
    with pytest.raises(UnsupportedError, match="it was resized"):
        store.load_adapter(place)


def test_missing_files_and_pickles(adapter: Path, tmp_path: Path) -> None:
    place = shutil.copytree(adapter, tmp_path / "work")
    weights = (place / "adapter_model.safetensors").read_bytes()
    (place / "adapter_model.safetensors").write_bytes(weights[:-8])
    with pytest.raises(UsageError, match="truncated"):
        store.load_adapter(place)
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no adapter_model\.safetensors"):
        store.load_adapter(place)
    (place / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UsageError, match="pickle"):
        store.load_adapter(place)
    (place / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        store.load_adapter(place)
    (place / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match=r"no adapter_config\.json"):
        store.load_adapter(place)


def test_the_base_is_taken_from_the_config(tmp_path: Path) -> None:
    folder, graph = base_of("llama")
    store.save(randomised(run.apply(graph, passes.make("lora", rank=4))), tmp_path / "work")
    assert store.load_adapter(tmp_path / "work").source == str(folder)
    (tmp_path / "work" / "adapter_config.json").write_text(
        json.dumps({**read(tmp_path / "work"), "base_model_name_or_path": None})
    )
    with pytest.raises(UsageError, match="names no base"):
        store.load_adapter(tmp_path / "work")


def test_an_adapter_of_another_base(adapter: Path) -> None:
    with pytest.raises(UsageError, match="targets no module of gpt2"):
        store.load_adapter(adapter, base_of("gpt2")[0])
    with pytest.raises(UsageError, match=r"its place in the base|unexpected adapter key|missing adapter key"):
        store.load_adapter(adapter, base_of("opt")[0])


def test_a_trained_value_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    graph = run.apply(base_of("llama")[1], passes.make("lora", rank=4)).copy()
    graph.inserted["model.layers.0.self_attn.q_proj.lora.a"] = lambda: torch.full((4, 32), float("inf"))
    with pytest.raises(CheckFailed, match="NaN or Inf"):
        store.save(graph, tmp_path / "work")
    assert list(tmp_path.iterdir()) == []
