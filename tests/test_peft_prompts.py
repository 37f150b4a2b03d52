"""Prefixes and prompts go both ways between surgeon and PEFT: the same keys, the same layout, the same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.zoo import build
from benchmarks.zoo.folders import base_of, captured, reference
from benchmarks.zoo.graphs import randomised
from surgeon import fold, passes, run, store
from surgeon.errors import UnsupportedError, UsageError
from surgeon.graph import Graph
from surgeon.model import SurgeonModel, load_model
from surgeon.peft_files import write_adapter
from surgeon.render import Rendered, Sample
from surgeon.train import train

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
        options |= {"sites": "decoder", "biased": True}
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
    assert "virtual tokens stay an adapter" in (tmp_path / "work" / "README.md").read_text()


OWN: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "every-prefix": ("bart", "prefix", {"sites": "encoder,decoder,cross"}, "at every self-attention"),
    "some-layers": ("gemma2", "prefix", {"targets": "*.layers.[01].*"}, "at every self-attention"),
    "gates": ("gemma2", "prefix", {"init": "gated"}, "gate"),
    "open-windows": ("gemma2", "prefix", {"windowed": False}, "sliding window"),
    "no-position-bias": ("t5", "prefix", {"sites": "decoder"}, "position biases"),
    "biases": ("gpt2", "prefix", {"bias": "all"}, "without biases"),
    "both-sides": ("bart", "prompt", {"side": "both"}, "encoder"),
    "cut-off": ("bert", "prompt", {"layout": "tokens"}, "layout=peft"),
}


@pytest.mark.parametrize("case", OWN)
def test_what_peft_has_no_place_for_is_saved_in_our_own_form(case: str, tmp_path: Path) -> None:
    family, method, options, reason = OWN[case]
    graph = randomised(run.apply(base_of(family)[1], passes.make(method, tokens=TOKENS, **options)))
    store.save(graph, tmp_path / "work")
    assert not (tmp_path / "work" / "adapter_config.json").exists()
    again = store.load(tmp_path / "work")
    assert {name: tensor.tolist() for name, tensor in values(again).items()} == {
        name: tensor.tolist() for name, tensor in values(graph).items()
    }
    with pytest.raises(UnsupportedError, match=reason) as caught:
        write_adapter(graph, method, graph.applied[-1], tmp_path / "peft")  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 3
    assert not (tmp_path / "peft").exists()


def values(graph: Graph) -> dict[str, torch.Tensor]:
    return {name: read() for name, read in graph.inserted.items()}


def test_the_mlp_is_kept_beside_what_peft_reads(tmp_path: Path, loads: list[Any]) -> None:
    folder, base = base_of("gemma2")
    graph = trained("prefix", base, "", hidden=6)
    store.save(graph, tmp_path / "work")
    again = store.load(tmp_path / "work")
    assert values(again).keys() == values(graph).keys()
    assert all(torch.equal(tensor, values(graph)[name]) for name, tensor in values(again).items())
    assert again.trainable().keys() == graph.trainable().keys()
    ours = answers(load_model(graph), graph)
    model = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    assert torch.allclose(ours, answers(model, graph), atol=1e-5)
    assert torch.allclose(ours, answers(load_model(store.load_adapter(tmp_path / "work")), graph), atol=1e-5)
    plain = store.load_adapter(tmp_path / "work")
    assert {name.rpartition(".")[2] for name in plain.inserted} == {"k", "v"}


def test_a_table_and_an_mlp_that_differ_are_refused(tmp_path: Path) -> None:
    graph = trained("prefix", base_of("gemma2")[1], "", hidden=6)
    file = store.save(graph, tmp_path / "work") / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"] + 1}, file)
    with pytest.raises(UsageError, match="different virtual tokens"):
        store.load(tmp_path / "work")


STACKS = {
    "prefix-lora": ("prefix", "lora"),
    "lora-prompt": ("lora", "prompt"),
    "prefix-prompt-vera": ("prefix", "prompt", "vera"),
}


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_has_a_peft_adapter_per_method(stack: str, tmp_path: Path) -> None:
    folder, base = base_of("gemma2")
    options: dict[str, Any] = {"lora": {"rank": 2}, "vera": {"rank": 4}}
    steps = [passes.make(name, **options.get(name, options_of(name, ""))) for name in STACKS[stack]]
    graph = randomised(run.apply(base, *steps))
    store.save(graph, tmp_path / "work")
    again = store.load(tmp_path / "work")
    assert all(torch.equal(tensor, values(graph)[name]) for name, tensor in values(again).items())
    assert torch.equal(answers(load_model(again), graph), answers(load_model(graph), graph))
    for step in steps:
        alone = store.load_adapter(tmp_path / "work" / step.name)
        assert [found.name for found in alone.applied] == [step.name]
        peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work" / step.name)


DAMAGE: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "missing adapter key: prompt_embeddings": lambda table: {"other": table},
    "unexpected adapter key: other": lambda table: {"prompt_embeddings": table, "other": table.clone()},
    r"prompt_embeddings is \[3, 180\]": lambda table: {"prompt_embeddings": table[:, :180].contiguous()},
    r"prompt_embeddings is \[2, 192\]": lambda table: {"prompt_embeddings": table[:2].contiguous()},
    "NaN or Inf": lambda table: {"prompt_embeddings": table * float("nan")},
}


@pytest.mark.parametrize("words", DAMAGE)
def test_damaged_tables_are_named(words: str, tmp_path: Path) -> None:
    file = store.save(trained("prefix", base_of("gemma2")[1], ""), tmp_path / "work") / "adapter_model.safetensors"
    save_file(DAMAGE[words](load_file(file)["prompt_embeddings"]), file)
    for load in (store.load, store.load_adapter):
        with pytest.raises(UsageError, match=words) as caught:
            load(tmp_path / "work")
        assert len(str(caught.value).splitlines()) == 3


def test_training_goes_on_from_a_checkpoint_and_from_a_work_folder(tmp_path: Path) -> None:
    """With the MLP, which PEFT loses: the same as a run that was never interrupted, bit for bit."""
    base = base_of("llama")[1]
    rows = torch.randint(3, 100, (6, 6), generator=torch.Generator().manual_seed(0)).tolist()
    data = Rendered(tuple(Sample(ids, [-100, *ids[1:]]) for ids in rows))
    recipe: dict[str, Any] = {"lr": 0.01, "batch_size": 2, "save_every": 2, "progress": False}
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)

    def model() -> SurgeonModel:
        return load_model(run.apply(base, passes.make("prefix", tokens=TOKENS, hidden=6, dropout=0.2)))

    whole, parts = model(), model()
    train(whole, tokenizer, data, out=tmp_path / "whole", steps=4, **recipe)
    train(parts, tokenizer, data, out=tmp_path / "parts", steps=4, **recipe)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    again = model()
    train(again, tokenizer, data, out=tmp_path / "parts", steps=4, resume=True, **recipe)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    again.save(tmp_path / "work")
    more = load_model(store.load(tmp_path / "work"))
    before = {name: p.detach().clone() for name, p in more.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in before} >= {"decoder_table", "decoder_weight", "k_weight", "v_bias"}
    train(more, tokenizer, data, out=tmp_path / "more", steps=2, **recipe)
    assert all(not torch.equal(value, more.get_parameter(name)) for name, value in before.items())


@pytest.mark.parametrize(
    ("family", "task"),
    [("bert", "sequence-classification"), pytest.param("roberta", "question-answering", marks=pytest.mark.slow)],
)
def test_p_tuning_v2_brings_its_head(family: str, task: str, tmp_path: Path, loads: list[Any]) -> None:
    folder, base = base_of(family, task)
    graph = randomised(run.apply(base, passes.make("ptuning_v2", tokens=TOKENS)))
    store.save(graph, tmp_path / "work")
    model = peft.PeftModel.from_pretrained(reference(folder), tmp_path / "work").eval()
    assert loads[0].missing_keys == []
    ours = answers(load_model(graph), graph)
    assert torch.allclose(ours, answers(model, graph), atol=1e-5)
    again = store.load_adapter(tmp_path / "work")
    assert torch.allclose(ours, answers(load_model(again), graph), atol=1e-6)
    assert again.trainable().keys() == {name.replace("ptuning_v2", "prefix") for name in graph.trainable()}
