"""Prefixes and prompts go both ways between surgeon and PEFT: the same keys, the same layout, the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.zoo import build
from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import randomised
from surgeon import fold, passes, run, store
from surgeon.graph import Graph
from surgeon.model import load_model

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own
TOKENS = 3
CAUSAL = ("llama", "qwen3", "gpt2", "opt", "gpt_neox", "gemma2", "gemma3_text", "mistral", "t5", "bart")
ENCODERS = {
    "bert": ("sequence-classification", "features", "token-classification"),
    "roberta": ("sequence-classification", "token-classification", "question-answering"),
}
OFTEN = (("gemma2", ""), ("bart", ""), ("bert", "sequence-classification"))
CASES = [*((name, "") for name in CAUSAL), *((name, task) for name, tasks in ENCODERS.items() for task in tasks)]
FAMILIES = [
    pytest.param(*case, id="-".join(filter(None, case)), marks=[] if case in OFTEN else [pytest.mark.slow])
    for case in CASES
]


@pytest.fixture(autouse=True)
def capture_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture is not what is tested here."""
    for module in ("surgeon.peft_load", "surgeon.store"):
        monkeypatch.setattr(f"{module}.open_graph", lambda source, **_: captured(source))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What PEFT says of each file it loads: no key may be missing, none unexpected but for the head it saves."""
    results: list[Any] = []
    load = peft.PeftModel.load_adapter

    def recorded(*args: Any, **options: Any) -> Any:
        results.append(load(*args, **options))
        return results[-1]

    monkeypatch.setattr(peft.PeftModel, "load_adapter", recorded)
    return results


def inputs(graph: Graph) -> dict[str, torch.Tensor]:
    batch = build.tokens(graph.config, 2, 7, padding=0)
    if graph.task == "seq2seq-lm":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
        batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
    return batch


@torch.no_grad()
def answers(model: Any, graph: Graph) -> torch.Tensor:
    """Logits, or the scores or states that stand for them, without the positions of virtual tokens."""
    output = model(**inputs(graph))
    name = next(
        name for name in ("logits", "start_logits", "last_hidden_state") if getattr(output, name, None) is not None
    )
    result: torch.Tensor = getattr(output, name)
    return result if graph.task == "sequence-classification" else result[:, -min(7, result.shape[1]) :][:, -4:]


def options_of(method: str, task: str) -> dict[str, Any]:
    if method == "prompt":
        return {"tokens": TOKENS, "init": "normal", "layout": "peft" if task else "tokens"}
    return {"tokens": TOKENS}


def trained(method: str, graph: Graph, task: str, **options: Any) -> Graph:
    if method == "prefix" and graph.task == "seq2seq-lm":
        options["sites"] = "decoder"
    return randomised(run.apply(graph, passes.make(method, **{**options_of(method, task), **options})), std=1.0)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_peft_loads_what_surgeon_writes(family: str, task: str, method: str, tmp_path: Path, loads: list[Any]) -> None:
    folder, base = base_of(family, task)
    graph = trained(method, base, task)
    ours = answers(load_model(graph), graph)
    store.save(graph, tmp_path / "work")
    model = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    assert [(r.missing_keys, [k for k in r.unexpected_keys if k != "prompt_embeddings"]) for r in loads] == [([], [])]
    assert torch.allclose(ours, answers(model, graph), atol=1e-5)
    assert not torch.allclose(ours, answers(reference(folder), graph), atol=1e-3)
    again = store.load_adapter(tmp_path / "work")
    for item, same in zip(fold.rest(graph), fold.rest(again), strict=True):
        for name, tensor in item.tensors().items():
            assert torch.equal(same.tensors()[name], tensor), (item.site.path, name)


CONFIGS: dict[str, Callable[..., Any]] = {
    "prefix": peft.PrefixTuningConfig,
    "prefix-mlp": lambda **options: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=20, **options),
    "prompt": peft.PromptTuningConfig,
    "p-tuning": lambda **options: peft.PromptEncoderConfig(encoder_hidden_size=20, **options),
}
# Where PEFT's guess, the hidden size, is not what the model has.
TOKEN_DIM = {("t5", "prefix"): 48, ("opt", "prompt"): 16, ("opt", "p"): 16}
TASK_TYPES: Mapping[str, str] = {
    "causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM", "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS", "question-answering": "QUESTION_ANS", "features": "FEATURE_EXTRACTION",
}  # fmt: skip


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(("family", "task"), FAMILIES)
def test_surgeon_loads_what_peft_writes(family: str, task: str, method: str, tmp_path: Path) -> None:
    folder, base = base_of(family, task)
    sizes = {"token_dim": width} if (width := TOKEN_DIM.get((family, method.partition("-")[0]))) else {}
    config = CONFIGS[method](task_type=TASK_TYPES[base.task], num_virtual_tokens=TOKENS, **sizes)
    torch.manual_seed(0)
    model = peft.get_peft_model(reference(folder), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path)
    graph = store.load_adapter(tmp_path, base=folder)
    assert torch.allclose(answers(load_model(graph), graph), answers(model, graph), atol=1e-5)
    assert not torch.allclose(answers(reference(folder), graph), answers(model, graph), atol=1e-3)


def test_the_layout_is_keys_and_values_in_turn(tmp_path: Path) -> None:
    graph = trained("prefix", base_of("gemma2")[1], "")
    store.save(graph, tmp_path / "work")
    table = load_file(tmp_path / "work" / "adapter_model.safetensors")["prompt_embeddings"]
    rows = table.view(TOKENS, 8, 2, 12)
    for layer in range(4):
        stem = f"model.layers.{layer}.self_attn.prefix"
        assert torch.equal(rows[:, 2 * layer].transpose(0, 1), graph.inserted[f"{stem}.k"]())
        assert torch.equal(rows[:, 2 * layer + 1].transpose(0, 1), graph.inserted[f"{stem}.v"]())
    config = json.loads((tmp_path / "work" / "adapter_config.json").read_text())
    assert (config["token_dim"], config["num_attention_heads"], config["num_layers"]) == (24, 2, 4)
    assert "target_modules" not in config
