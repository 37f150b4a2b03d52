"""Adapters go both ways between surgeon and PEFT: the same keys, the same logits, the same merged bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from benchmarks.zoo import build
from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import randomised
from surgeon import passes, run, store
from surgeon.fold import fold
from surgeon.graph import Graph
from surgeon.model import load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", captured)


def inputs(graph: Graph) -> dict[str, torch.Tensor]:
    batch = build.tokens(graph.config, 2, 7, padding=0)
    if graph.task == "seq2seq-lm":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    return batch


@torch.no_grad()
def logits(model: Any, graph: Graph) -> torch.Tensor:
    result: torch.Tensor = model(**inputs(graph)).logits
    return result


def loaded_by_peft(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT's own loading, with no key missing and none unexpected."""
    results = []
    load = peft.PeftModel.load_adapter

    def recorded(*args: Any, **options: Any) -> Any:
        results.append(load(*args, **options))
        return results[-1]

    monkeypatch.setattr(peft.PeftModel, "load_adapter", recorded)
    model = peft.PeftModel.from_pretrained(reference(base), adapter).eval()
    assert [(result.missing_keys, result.unexpected_keys) for result in results] == [([], [])]
    return model


def assert_same_merge(model: Any, graph: Graph) -> None:
    """PEFT's merge and ours, bit for bit."""
    ours = fold(graph)
    merged = model.merge_and_unload()
    for name, parameter in merged.named_parameters():
        value = ours.inserted[name]() if name in ours.inserted else ours.values[ours.resolve(name)]
        assert torch.equal(parameter.data, value), name


WRITTEN = {
    "llama-lora": ("llama", "lora", {"targets": "*.{q,v}_proj", "rank": 4}),
    "llama-some": ("llama", "lora", {"targets": "model.layers.[02].*_proj", "rank": 4, "rslora": True}),
    "llama-embedding": ("llama", "lora", {"targets": "embed_tokens,q_proj,lm_head", "rank": 4}),
    "llama-tied": ("llama-tied", "lora", {"targets": "q_proj", "rank": 4, "modules_to_save": "embed_tokens"}),
    "gpt2-lora": ("gpt2", "lora", {"targets": "all-linear", "rank": 4, "bias": "all"}),
    "gpt2-vera": ("gpt2", "vera", {"targets": "c_attn,c_fc", "rank": 8, "key": 5, "bias": "sites"}),
    "bert-lora": ("bert", "lora", {"targets": "query,value", "rank": 4, "modules_to_save": "classifier"}),
    "bert-headless": ("bert", "lora", {"targets": "query,value", "rank": 4}),
    "t5-vera": ("t5", "vera", {"targets": "q,v,wo", "rank": 8, "save_projection": False}),
    "neox-patterns": (
        "gpt_neox",
        "lora",
        {
            "targets": "all-linear",
            "rank": 4,
            "alpha": 6.0,
            "ranks": [["dense", 2], ["gpt_neox.layers.1.*", 3]],
            "alphas": [["dense", 5.5]],
        },
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_peft_loads_what_surgeon_writes(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, method, options = WRITTEN[case]
    folder, graph = base_of(family)
    graph = randomised(run.apply(graph, passes.make(method, **options)))
    ours = logits(load_model(graph), graph)
    store.save(graph, tmp_path / "work")
    model = loaded_by_peft(folder, tmp_path / "work", monkeypatch)
    assert torch.allclose(ours, logits(model, graph), atol=1e-5)
    assert not torch.allclose(ours, logits(reference(folder), graph), atol=1e-3)
    again = store.load_adapter(tmp_path / "work")
    for name in graph.inserted:
        assert torch.equal(again.inserted[name](), graph.inserted[name]()), name
    assert again.trainable().keys() == graph.trainable().keys()
    assert again.text() == graph.text()
    assert_same_merge(model, graph)


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6}
PATTERNS = {"rank_pattern": {"k_proj": 3, r"layers\.[13]\.self_attn\.q_proj": 2}, "alpha_pattern": {"v_proj": 9}}
READ: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama-rslora": (
        "llama",
        lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj", "nowhere"], use_rslora=True),
    ),
    "llama-patterns": ("llama", lambda: peft.LoraConfig(**LORA, **PATTERNS, target_modules="all-linear")),
    "llama-regex": ("llama", lambda: peft.LoraConfig(**LORA, target_modules=r".*layers\.[0-2]\..*(q|down)_proj")),
    "llama-layers": (
        "llama",
        lambda: peft.LoraConfig(
            **LORA, target_modules=["q_proj", "up_proj"], layers_to_transform=[1, 3], layers_pattern="layers"
        ),
    ),
    "llama-exclude": (
        "llama",
        lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "k_proj"], exclude_modules=r".*layers\.0\..*"),
    ),
    "llama-embedding": ("llama", lambda: peft.LoraConfig(**LORA, target_modules=["embed_tokens", "o_proj", "lm_head"])),
    "llama-tied": (
        "llama-tied",
        lambda: peft.LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    ),
    "gpt2-conv1d": (
        "gpt2",
        lambda: peft.LoraConfig(**LORA, target_modules=["c_attn", "wte", "wpe"], fan_in_fan_out=True),
    ),
    "bert-head": (
        "bert",
        lambda: peft.LoraConfig(
            **LORA, target_modules=["query", "dense"], exclude_modules=["pooler.dense"], task_type="SEQ_CLS"
        ),
    ),
    "bert-bias": ("bert", lambda: peft.LoraConfig(**LORA, target_modules=["query"], bias="all")),
    "opt-bias": ("opt", lambda: peft.LoraConfig(**LORA, target_modules=["q_proj", "fc1"], bias="lora_only")),
    "t5-lora": ("t5", lambda: peft.LoraConfig(**LORA, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")),
    "llama-vera": (
        "llama",
        lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "down_proj"], projection_prng_key=7),
    ),
    "gpt2-vera": (
        "gpt2",
        lambda: peft.VeraConfig(r=8, target_modules=["c_attn", "c_proj"], save_projection=False, fan_in_fan_out=True),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_surgeon_loads_what_peft_writes(case: str, tmp_path: Path) -> None:
    family, configured = READ[case]
    config = configured()
    folder, plain = base_of(family)
    model = peft.get_peft_model(reference(folder), config).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    graph = store.load_adapter(tmp_path, folder, plain.task)
    assert torch.allclose(logits(load_model(graph), graph), logits(model, graph), atol=1e-5)
    assert sum(spec.count for spec in graph.trainable().values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert_same_merge(model, graph)
